"""A page that leads from each number of a success table to the seeds of its demonstrations.

Every output is named by the first 16 digits of its digest, as in success.csv, and each name of an
input is a link to what made it: rollouts, checkpoint, image cache, dataset, replayed demos, demos.
"""

import html
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, write_atomic

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 1.5em; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 1em }
th, td { text-align: left; vertical-align: top; padding: .2em .7em .2em 0 }
tr { border-bottom: 1px solid #ddd; scroll-margin-top: 6em } tr:target { background: #fff3c4 }
code { font-size: 12px } pre { font-size: 12px; white-space: pre-wrap }
summary { cursor: pointer; font-weight: bold; margin-top: .6em }
"""


def write_provenance_page(success: "pd.DataFrame", rollouts: list[Path], file: Path) -> None:
    """Write the page of a run.

    Args:
        success: its success table.
        rollouts: manifests of the rollouts of its checkpoints.
        file: provenance.html to write.
    """
    ancestors = read_ancestors(rollouts)
    names = {item["digest"]: short(item["digest"]) for item in ancestors.values()}
    stages: dict[str, dict[str, dict]] = {}
    newest_first = sorted(ancestors.items(), key=lambda item: item[1]["created"], reverse=True)
    for path, manifest in newest_first:
        stages.setdefault(manifest["stage"], {})[path] = manifest
    run = html.escape(str(success.run[0]))
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>Provenance of {run}</title>',
        f"<style>{STYLE}</style><h1>Where the numbers of {run} come from</h1>",
        "<p>Each name is the beginning of a digest; it leads to what it names.</p>",
        number_table(success, rollouts, names),
        *(stage_table(stage, outputs, names) for stage, outputs in stages.items()),
        '<script>addEventListener("click", ({ target }) => { const row = target.hash && '
        'document.getElementById(target.hash.slice(1)); if (row) row.closest("details").open = true'
        "})</script>",
    ]
    write_atomic(file, "\n".join(parts) + "\n")


def read_ancestors(manifests: list[Path]) -> dict[str, dict]:
    """Return {path: manifest} of some manifests and of all that they were made from.

    What is no manifest, or is not on this machine, is left out.
    """
    found: dict[str, dict] = {}
    waiting = [str(path) for path in manifests]
    while waiting:
        path = waiting.pop(0)
        if path in found or not path.endswith(".json"):
            continue
        try:
            found[path] = read_manifest(Path(path))
        except UserError:
            continue
        waiting += [item["path"] for item in list_inputs(found[path])]
    return found


def list_inputs(manifest: dict) -> list[dict]:
    """Return {"path": ..., "digest": ...} of each input."""
    return [item for items in manifest["inputs"].values() for item in items]


def short(digest: str) -> str:
    """Return what stands for a digest in tables."""
    return digest[:16]


def to_ranges(numbers: list[int]) -> str:
    """Return numbers as text: [3, 4, 5, 9] as "3-5, 9"."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    parts = [numbers[start:end] for start, end in pairwise(starts)]
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def link(digest: str, names: dict[str, str]) -> str:
    """Return a digest's name, as a link to the row that describes it if there is one."""
    name = short(digest)
    return (
        f'<a href="#{name}"><code>{name}</code></a>' if digest in names else f"<code>{name}</code>"
    )


def make_table(header: list[str], rows: list[str]) -> str:
    """Return an HTML table of rows that are HTML."""
    cells = "".join(f"<th>{name}</th>" for name in header)
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def number_table(success: "pd.DataFrame", rollouts: list[Path], names: dict[str, str]) -> str:
    """Return the success table, each row with links to its rollouts, checkpoint and dataset."""
    manifests = {
        manifest["metadata"]["step"]: manifest for manifest in map(read_manifest, rollouts)
    }
    rows = []
    for item in success.to_dict("records"):
        manifest = manifests[item["step"]]
        cells = [
            item["step"],
            f"{item['successes']} of {item['episodes']}",
            f"{100 * item['ci_low']:.0f} to {100 * item['ci_high']:.0f} %",
            link(manifest["digest"], names),
            link(manifest["metadata"]["checkpoint"], names),
            link(manifest["metadata"]["dataset"], names),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = ["step", "success once", "95 % interval", "rollouts", "checkpoint", "dataset"]
    return make_table(header, rows)


def stage_table(stage: str, outputs: dict[str, dict], names: dict[str, str]) -> str:
    """Return the outputs of a stage, folded, with what made the first of them in full."""
    rows = []
    for path, manifest in outputs.items():
        inputs = " ".join(link(item["digest"], names) for item in list_inputs(manifest))
        cells = [
            f"<code>{short(manifest['digest'])}</code>",
            f"<code>{html.escape(path)}</code>",
            inputs,
            describe_seeds(manifest),
            manifest["created"],
            f"{manifest['wall_time_s']:.0f}",
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr id="{short(manifest["digest"])}">{body}</tr>')
    first = next(iter(outputs.values()))
    made_by = {key: first[key] for key in ("settings", "code", "versions")}
    header = ["digest", "manifest", "made from", "seeds", "created", "seconds"]
    return (
        f"<details><summary>{html.escape(stage)}: {len(outputs)}</summary>"
        f"{make_table(header, rows)}"
        f"<pre>{html.escape(json.dumps(made_by, indent=1))}</pre></details>"
    )


def describe_seeds(manifest: dict) -> str:
    """Return the seeds of an output's demos or episodes as text, "" if it has none."""
    if seeds := manifest["metadata"].get("seeds"):
        return to_ranges(seeds)
    evaluation = manifest["settings"].get("evaluation")
    if manifest["stage"] == "rollout" and evaluation:
        first = evaluation["first_seed"]
        return to_ranges(list(range(first, first + evaluation["num_episodes"])))
    return ""
