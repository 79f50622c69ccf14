"""Runs and checkpoints compared, episode by episode on the same seeds.

In:  the manifests of rollouts, with a CSV file of episodes beside each.
Out: a table with a row for each pair, and a figure of the differences.

The last checkpoint of each run is compared with that of each other run of its task, and with each
earlier checkpoint of its own. A row says in how many episodes both succeeded (n11), only the first
(n10), only the second (n01) and neither (n00); the difference of success_once with its 95 % paired
interval; McNemar's mid-p value; and how many episodes would show a difference of this size with
80 % power. further_10 and further_01 count the episodes in which one came to a later milestone than
the other, which tells policies apart that both fail.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.evaluation.statistics import episodes_for_power, mcnemar_mid_p, paired_interval
from demo2eval.figures import BLUE, new_figure
from demo2eval.maniskill.milestones import NOTHING
from demo2eval.provenance import read_manifest, verify_outputs, write_atomic

if TYPE_CHECKING:
    import pandas as pd


def compare_runs(rollouts: list[Path], *, table: Path, figure: Path) -> None:
    """Compare runs and checkpoints.

    Args:
        rollouts: manifests results/<run>/rollouts/<step>.json.
        table: CSV file to write.
        figure: PNG file to write.

    Raises:
        UserError: if two runs of a task were not evaluated in the same way on the same seeds, or no
            two checkpoints are of the same task.
    """
    import pandas as pd

    rows = [
        {"task": first.task, "run": first.run, "step": first.step}
        | {"other_run": second.run, "other_step": second.step}
        | compare(first, second)
        for first, second in list_pairs([Rollouts(path) for path in rollouts])
    ]
    if not rows:
        raise UserError(
            f"{', '.join(map(str, rollouts))}: no two of them are of the same task; name runs of "
            "one task."
        )
    frame = pd.DataFrame(rows)
    draw_differences(frame, figure)
    write_atomic(table, frame.to_csv(index=False, lineterminator="\n"))
    for row in rows:
        print(describe(row))


class Rollouts:
    """The rollouts of a checkpoint.

    Attributes:
        run, step, task: whose they are.
        settings: how the episodes were made; pairs need equal ones.
        episodes: a row for each, by seed.
        furthest: number of the furthest milestone, by seed.
    """

    def __init__(self, path: Path):
        """Read them.

        Args:
            path: their manifest.

        Raises:
            UserError: if they are missing or damaged.
        """
        import pandas as pd

        verify_outputs(path)
        manifest = read_manifest(path)
        self.path, self.run = path, path.parent.parent.name
        self.step: int = manifest["metadata"]["step"]
        self.settings = manifest["settings"]
        self.task: str = self.settings["task"]
        self.episodes = pd.read_csv(path.with_suffix(".csv"), index_col="seed")
        names = [NOTHING, *self.settings["milestones"]["names"]]
        self.furthest = self.episodes.milestone.map(names.index)

    def check_comparable(self, other: "Rollouts") -> None:
        """Raise a UserError if the episodes were made in another way, or on other seeds."""
        if self.settings != other.settings:
            raise UserError(
                f"{self.path} and {other.path} were evaluated under different settings; give "
                "their runs the same `evaluation`, or compare them apart."
            )


def list_pairs(rollouts: list[Rollouts]) -> list[tuple[Rollouts, Rollouts]]:
    """Return the pairs to compare, the later or first named checkpoint first.

    Raises:
        UserError: if a pair was evaluated in different ways.
    """
    last = {item.run: item for item in sorted(rollouts, key=lambda item: item.step)}
    named = [item for item in rollouts if item is last[item.run]]
    pairs = [pair for pair in combinations(named, 2) if pair[0].task == pair[1].task]
    pairs += [
        (last[item.run], item)
        for item in sorted(rollouts, key=lambda item: (item.run, item.step))
        if item is not last[item.run]
    ]
    for first, second in pairs:
        first.check_comparable(second)
    return pairs


def compare(first: Rollouts, second: Rollouts) -> dict:
    """Return the figures of a pair."""
    one = first.episodes.success_once.astype(bool)
    other = second.episodes.success_once.astype(bool)
    counts = [int(part.sum()) for part in (one & other, one & ~other, ~one & other, ~(one | other))]
    n11, n10, n01, n00 = counts
    further = [
        int((first.furthest > second.furthest).sum()),
        int((first.furthest < second.furthest).sum()),
    ]
    low, high = paired_interval(*counts)
    return {
        "episodes": len(one),
        "n11": n11,
        "n10": n10,
        "n01": n01,
        "n00": n00,
        "difference": round((n10 - n01) / len(one), 4),
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "mid_p": float(f"{mcnemar_mid_p(n10, n01):.3g}"),
        "episodes_for_80_percent_power": episodes_for_power(n10, n01, len(one)),
        "further_10": further[0],
        "further_01": further[1],
        "further_mid_p": float(f"{mcnemar_mid_p(*further):.3g}"),
    }


def name_pair(row: Mapping) -> str:
    """Return which checkpoints a row compares."""
    other = "" if row["other_run"] == row["run"] else f"{row['other_run']} "
    return f"{row['run']} {row['step']} against {other}{row['other_step']}"


def describe(row: Mapping) -> str:
    """Return a row as a sentence."""
    sentence = (
        f"{name_pair(row)}: "
        f"{100 * row['difference']:+.0f} points ({100 * row['ci_low']:+.0f} to "
        f"{100 * row['ci_high']:+.0f}), p = {row['mid_p']:.2g}"
    )
    needed = row["episodes_for_80_percent_power"]
    if row["ci_low"] <= 0 <= row["ci_high"] and needed:
        sentence += f"; {needed} episodes would settle a difference of this size"
    return sentence


def draw_differences(rows: "pd.DataFrame", file: Path) -> None:
    """Draw the difference of each pair with its interval."""
    places = range(len(rows))
    middle, low, high = (100 * rows[name] for name in ("difference", "ci_low", "ci_high"))
    with new_figure(file, figsize=(7.2, 1.2 + 0.34 * len(rows))) as (_, panel):
        errors = [middle - low, high - middle]
        panel.errorbar(middle, places, xerr=errors, fmt="o", color=BLUE, capsize=3)
        panel.axvline(0, color="0.3", linestyle=":", linewidth=1.2)
        panel.set_yticks(places, map(name_pair, rows.to_dict("records")), fontsize=9)
        panel.invert_yaxis()
        panel.set_xlabel("difference of success once\n(percentage points, 95 % paired interval)")


if __name__ == "__main__":
    run(compare_runs)
