# So that `snakemake results/<run>/success.csv` works from here.
include: "workflow/Snakefile"
