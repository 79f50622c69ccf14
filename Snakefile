"""From ManiSkill demonstrations to a success-rate table for Pi0.5.

    snakemake --cores 8 results/stackcube/success.csv

The name after results/ is a run of config/config.yaml. Without a target the quickstart's run is made.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"
configfile: "config/quickstart.yaml"


include: "workflow/rules/common.smk"


rule quickstart:
    input:
        "results/quickstart/success.csv",
        "results/quickstart/success.png",


include: "workflow/rules/demos.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/evaluation.smk"


onstart:
    check_before_work()


onerror:
    print(
        "A job failed; its log, named above, says why. What is finished stays: the same command goes on from there.",
        file=sys.stderr,
    )
