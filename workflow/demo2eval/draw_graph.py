"""Draws Snakemake's rule graph and the jobs of a target as SVG, without Graphviz.

In:  a target, such as results/quickstart/success.csv.
Out: <output>/rulegraph.svg, <output>/dag.svg.

Snakemake says what depends on what; arrows that others imply are left out. Nodes are laid out in layers by their longest way from the
inputs, and within a layer by the mean place of their neighbours (Sugiyama, Tagawa and Toda, 1981).
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from demo2eval.cli import run, stage_parser
from demo2eval.errors import UserError

SWEEPS = 12
FILL = {"demos": "#E3F1FA", "data": "#E4F3EA", "training": "#FCEFD9", "evaluation": "#F6E4EE", "target": "#EEEEEE"}
STAGE = {
    "plan": "demos",
    "import_demos": "demos",
    "download_demos": "demos",
    "replay": "demos",
    "dataset": "data",
    "norm_stats": "data",
    "training_cache": "data",
    "init_checkpoint": "training",
    "train_segment": "training",
    "rollout": "evaluation",
    "video": "evaluation",
    "success_table": "evaluation",
}


def ask_snakemake(target: str, kind: str, extra: list[str]) -> str:
    """Return Snakemake's own graph in the dot language.

    Raises:
        UserError: if Snakemake cannot plan the target; with its own words.
    """
    command = [sys.executable, "-m", "snakemake", target, f"--{kind}", "dot", "--cores", "1", "--forceall", *extra]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"Snakemake cannot plan {target}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def short(label: str) -> str:
    """Return a job's label with the names of shared work, which are long, left out."""
    lines = label.split("\\n")
    return "\n".join([lines[0], *(line for line in lines[1:] if line.startswith(("shard:", "step:")))])


def parse_dot(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return ({node: label}, [(node, node that depends on it), ...]) of a graph as Snakemake writes it."""
    nodes = re.findall(r'^\s*(\d+)\s*\[\s*label\s*=\s*"([^"]*)"', text, re.MULTILINE)
    edges = [(one, other) for one, other in re.findall(r"(\d+)\s*->\s*(\d+)", text) if one != other]
    return {node: short(label) for node, label in nodes}, without_implied(edges)


def without_implied(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges without those that a longer way implies (transitive reduction; Aho, Garey and Ullman, 1972)."""
    after = defaultdict(set)
    for one, other in edges:
        after[one].add(other)

    def reaches(start: str, wanted: str) -> bool:
        waiting, seen = [node for node in after[start] if node != wanted], set()
        while waiting:
            node = waiting.pop()
            if node == wanted:
                return True
            if node not in seen:
                seen.add(node)
                waiting.extend(after[node])
        return False

    return [(one, other) for one, other in edges if not reaches(one, other)]


def layers_of(labels: dict[str, str], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Return the nodes in layers: each as far down as its longest way from a node without inputs."""
    inputs = defaultdict(set)
    for one, other in edges:
        inputs[other].add(one)
    depth: dict[str, int] = {}
    waiting = list(labels)
    while waiting:
        # Long chains would overflow the stack if this were recursive.
        ready = [node for node in waiting if all(one in depth for one in inputs[node])]
        for node in ready:
            depth[node] = 1 + max((depth[one] for one in inputs[node]), default=-1)
        waiting = [node for node in waiting if node not in depth]
    layers = [[node for node in labels if depth[node] == level] for level in range(max(depth.values()) + 1)]
    return order(layers, edges)


def order(layers: list[list[str]], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Order the nodes of each layer by the mean place of their neighbours in all other layers, sweeping down and up."""
    neighbours = defaultdict(list)
    for one, other in edges:
        neighbours[one].append(other)
        neighbours[other].append(one)
    for sweep in range(SWEEPS):
        place = {node: (index + 0.5) / len(layer) for layer in layers for index, node in enumerate(layer)}
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            near = {node: [place[one] for one in neighbours[node]] or [place[node]] for node in layer}
            layer.sort(key=lambda node: sum(near[node]) / len(near[node]))
            place.update({node: (index + 0.5) / len(layer) for index, node in enumerate(layer)})
    return layers


def draw(labels: dict[str, str], edges: list[tuple[str, str]], file: Path) -> None:
    """Draw a graph into an SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "demo2eval"
    from matplotlib import pyplot

    layers = layers_of(labels, edges)
    widest = max(len(layer) for layer in layers)
    step_x, step_y = 1.75, 0.85 if max(label.count("\n") for label in labels.values()) == 0 else 1.05
    place = {}
    for level, layer in enumerate(layers):
        for index, node in enumerate(layer):
            place[node] = ((index - (len(layer) - 1) / 2) * step_x, -level * step_y)
    figure = pyplot.figure(figsize=(max(widest * step_x, 3.2), len(layers) * step_y + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    for one, other in edges:
        start, end = place[one], place[other]
        axes.annotate(
            "",
            (end[0], end[1] + 0.22),
            (start[0], start[1] - 0.22),
            arrowprops={"arrowstyle": "-|>", "color": "0.55", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
    for node, label in labels.items():
        name = label.split("\n")[0]
        style = {"boxstyle": "round,pad=0.35", "facecolor": FILL[STAGE.get(name, "target")], "edgecolor": "0.4", "linewidth": 0.8}
        axes.text(*place[node], label, ha="center", va="center", fontsize=9, bbox=style)
    axes.set_xlim(-widest * step_x / 2 - 0.1, widest * step_x / 2 + 0.1)
    axes.set_ylim(-(len(layers) - 1) * step_y - 0.5, 0.5)
    axes.axis("off")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw both graphs of a target."""
    parser = stage_parser(__doc__)
    parser.add_argument("--target", default="results/quickstart/success.csv", help="file to be made")
    parser.add_argument("--output", type=Path, default=Path("results/dag"), help="folder for the pictures")
    parser.add_argument("--configfile", nargs="+", default=[], help="more configuration files, as for Snakemake")
    arguments = parser.parse_args()
    extra = ["--configfile", *arguments.configfile] if arguments.configfile else []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for kind in ("rulegraph", "dag"):
        file = arguments.output / f"{kind}.svg"
        draw(*parse_dot(ask_snakemake(arguments.target, kind, extra)), file)
        print(file)


if __name__ == "__main__":
    run(main)
