# Demonstrations: planned here, published by ManiSkill, or the user's own; then replayed with pictures.


rule plan:
    output:
        "results/demos/{demos}/shard-{shard}/manifest.json",
    log:
        "results/demos/{demos}/shard-{shard}/plan.log",
    wildcard_constraints:
        demos=".+-planned-.+",
    params:
        options=plan_options,
        code=code("data.plan"),
    shell:
        "{PLAN} -m demo2eval.data.plan {params.options} --output {output} 2>&1 | tee {log}"


rule download_demos:
    output:
        "results/demos/{demos}/shard-000/manifest.json",
    log:
        "results/demos/{demos}/shard-000/download.log",
    wildcard_constraints:
        demos=".+-published-.+",
    params:
        options=taken_options,
        code=code("data.download_demos"),
    shell:
        "{PYTHON} -m demo2eval.data.download_demos {params.options} --output {output} 2>&1 | tee {log}"


rule import_demos:
    input:
        trajectories=lambda wildcards: demos_source(wildcards),
        description=lambda wildcards: str(Path(demos_source(wildcards)).with_suffix(".json")),
    output:
        "results/demos/{demos}/shard-000/manifest.json",
    log:
        "results/demos/{demos}/shard-000/import.log",
    wildcard_constraints:
        demos=".+-file-.+",
    params:
        options=taken_options,
        code=code("data.import_demos"),
    shell:
        "{PYTHON} -m demo2eval.data.import_demos {params.options} --input {input.trajectories} --output {output} 2>&1 | tee {log}"


rule replay:
    input:
        lambda wildcards: f"results/demos/{demos_name(run_of(replay_name, wildcards.replay))}/shard-{wildcards.shard}/manifest.json",
    output:
        "results/replays/{replay}/shard-{shard}/manifest.json",
    log:
        "results/replays/{replay}/shard-{shard}/replay.log",
    params:
        options=lambda wildcards: options(replay_settings(run_of(replay_name, wildcards.replay))),
        code=code("data.replay"),
    shell:
        "{PYTHON} -m demo2eval.data.replay {params.options} --input {input} --output {output} 2>&1 | tee {log}"
