"""A check for CI: fails if a checkpoint does worse than another one on the same seeds.

    python -m demo2eval.evaluation.regression --rollouts results/new/rollouts/3000.json \\
        --baseline results/old/rollouts/3000.json

ends with status 1 if the whole 95 % paired interval of the difference lies below `--margin`.
"""

from pathlib import Path

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.evaluation.comparison import Rollouts, compare, describe


def check_regression(rollouts: Path, baseline: Path, *, margin: float = 0.0) -> None:
    """Compare a checkpoint with a baseline.

    Args:
        rollouts: manifest of its rollouts.
        baseline: that of the baseline's.
        margin: of success_once, 0 to 1, by which it may be worse.

    Raises:
        UserError: if it is worse, or they were evaluated in different ways.
    """
    first, second = Rollouts(rollouts), Rollouts(baseline)
    first.check_comparable(second)
    row = {"run": first.run, "step": first.step}
    row |= {"other_run": second.run, "other_step": second.step} | compare(first, second)
    print(describe(row))
    if row["ci_high"] < -margin:
        raise UserError(
            f"{rollouts} does worse than {baseline}, by more than {margin:.0%} and beyond chance."
        )


if __name__ == "__main__":
    run(check_regression)
