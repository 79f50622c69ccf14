# So that `snakemake results/<run>/success.csv` works from here.
include: "workflow/Snakefile"


rule all:
    default_target: True
    input:
        rules.quickstart.input,
