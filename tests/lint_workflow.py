"""Run `snakemake --lint` and fail on anything that is not among the explained exceptions."""

import subprocess
import sys

EXCEPTIONS = {
    # Environments are locked by uv and made by `make setup`: a conda environment per rule would
    # install JAX and ManiSkill again. Containers are the site's choice.
    "Specify a conda environment or container for each rule.",
}


def main() -> None:
    """Print the findings and exit with status 1 if there are any."""
    command = [sys.executable, "-m", "snakemake", "--lint"]
    result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout + result.stderr
    lines = [line.strip() for line in said.splitlines()]
    lints = [line.removeprefix("* ").removesuffix(":") for line in lines if line.startswith("* ")]
    if not lints:
        sys.exit(f"snakemake --lint did not work:\n{said}")
    unexplained = [lint for lint in lints if lint not in EXCEPTIONS]
    print("\n".join(unexplained) or f"snakemake --lint: {len(lints)} lints, all explained")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
