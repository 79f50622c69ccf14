# So that `snakemake results/<run>/success.csv` works from here.
include: "workflow/Snakefile"


# An included file has no default target.
rule all:
    input:
        rules.quickstart.input,
