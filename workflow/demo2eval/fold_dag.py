"""Folds the jobs of a target into a graph that one can read: many jobs of a rule become one box.

    snakemake results/stackcube/success.csv --dag mermaid-js | python -m demo2eval.fold_dag

In:  Snakemake's DAG as Mermaid text, a box per job.
Out: the same with a box for all finished jobs of a rule and one for those to do, each with the
     count, the steps or shards, and what it makes.
"""

import re
import sys
from dataclasses import dataclass, field

NODE = re.compile(r"^\s*id(\d+)\[(.*)\]$")
STYLE = re.compile(r"^\s*style id(\d+) (.*)$")
EDGE = re.compile(r"^\s*id(\d+) --> id(\d+)$", re.MULTILINE)
INHERITED = ("run", "step", "shard")
NUMBERED = ("step", "shard")


@dataclass
class Job:
    """A job of Snakemake's graph.

    Attributes:
        wildcards: those that Snakemake shows, and of `INHERITED` those of all its inputs.
        inputs: numbers of the jobs that it waits for.
    """

    rule: str
    wildcards: dict[str, str]
    is_done: bool = False
    inputs: list[int] = field(default_factory=list)

    @property
    def box(self) -> tuple:
        """What jobs of the same box have in common."""
        others = {key: value for key, value in self.wildcards.items() if key not in NUMBERED}
        return self.rule, *others.values(), self.is_done


def fold(text: str) -> str:
    """Return the folded graph of a graph, both in Mermaid."""
    jobs = read_jobs(text)
    boxes: dict[tuple, list[int]] = {}
    for number, job in jobs.items():
        boxes.setdefault(job.box, []).append(number)
    names = {box: f"box{index}" for index, box in enumerate(boxes)}
    lines = ["flowchart TB"]
    lines += [f'    {names[box]}["{label([jobs[n] for n in boxes[box]])}"]' for box in boxes]
    edges = {
        (names[jobs[source].box], names[job.box]) for job in jobs.values() for source in job.inputs
    }
    lines += [f"    {source} --> {target}" for source, target in sorted(edges)]
    done = ",".join(names[box] for box in boxes if box[-1])
    lines.append("    classDef done fill:#eee,stroke:#999,stroke-dasharray:5 5,color:#666")
    lines += [f"    class {done} done"] if done else []
    return "\n".join(lines)


def read_jobs(text: str) -> dict[int, Job]:
    """Return the jobs of a graph by their number."""
    jobs: dict[int, Job] = {}
    for line in text.splitlines():
        if match := NODE.match(line):
            rule, *wildcards = match[2].split(" - ")
            shown = (wildcard.partition(": ") for wildcard in wildcards)
            jobs[int(match[1])] = Job(rule, {key: value for key, _, value in shown})
        elif match := STYLE.match(line):
            jobs[int(match[1])].is_done = "stroke-dasharray" in match[2]
        elif match := EDGE.match(line):
            jobs[int(match[2])].inputs.append(int(match[1]))
    complete: set[int] = set()
    for number in jobs:
        inherit(jobs, number, complete)
    return jobs


def inherit(jobs: dict[int, Job], number: int, complete: set[int]) -> None:
    """Give a job the wildcards that it has from its inputs: Snakemake shows only new ones."""
    waiting = [number]
    while waiting:
        job = jobs[waiting[-1]]
        if missing := [source for source in job.inputs if source not in complete]:
            waiting += missing
            continue
        complete.add(waiting.pop())
        for key in INHERITED:
            found = {jobs[source].wildcards.get(key) for source in job.inputs} - {None}
            if len(found) == 1:
                job.wildcards.setdefault(key, str(found.pop()))


def label(jobs: list[Job]) -> str:
    """Return the text of a box."""
    lines = [jobs[0].rule, *jobs[0].box[1:-1]]
    for key in NUMBERED:
        values = sorted({job.wildcards[key] for job in jobs if key in job.wildcards}, key=int)
        if len(values) == len(jobs) > 1:
            lines.append(f"{len(values)} {key}s: {values[0]} to {values[-1]}")
            break
        if len(values) == len(jobs) == 1:
            lines.append(f"{key} {values[0]}")
    else:
        if len(jobs) > 1:
            lines.append(f"{len(jobs)} jobs")
    return "<br/>".join([*lines, "done" if jobs[0].is_done else "to do"])


if __name__ == "__main__":
    graph = sys.stdin.read()
    if not EDGE.search(graph):
        sys.exit("demo2eval: error: no graph came in; what Snakemake said above is why.")
    print(fold(graph))
