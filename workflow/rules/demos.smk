# Demonstrations: planned here, published by ManiSkill, or the user's own; then replayed with images.


rule plan:
    output:
        "results/demos/{demos}/shard-{shard}/manifest.json",
    log:
        "results/demos/{demos}/logs/plan-{shard}.log",
    benchmark:
        "results/demos/{demos}/shard-{shard}/plan.benchmark.tsv"
    wildcard_constraints:
        demos=".+-planned-.+",
    resources:
        mem=4000,
        runtime=120,
        slurm_extra=slurm(),
    params:
        task=field("task", run_of_demos),
        robot=field("robot", run_of_demos),
        num_demos=shard_demos,
        first_seed=shard_seed,
        code=code("data.plan"),
    shell:
        "$PLANNING_PYTHON -m demo2eval.data.plan --task {params.task:q} --robot {params.robot:q}"
        " --num_demos {params.num_demos:q} --first_seed {params.first_seed:q} --output {output:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


checkpoint download_demos:
    output:
        "results/demos/{demos}/archive.json",
    log:
        "results/demos/{demos}/logs/download_demos.log",
    benchmark:
        "results/demos/{demos}/download_demos.benchmark.tsv"
    wildcard_constraints:
        demos=".+-published-.+",
    # Nodes of a cluster often have no way to the internet.
    localrule: True
    params:
        task=field("task", run_of_demos),
        code=code("data.download_demos"),
    shell:
        "$PYTHON -m demo2eval.data.download_demos --task {params.task:q} --output {output:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule import_demos:
    input:
        archive_of_demos,
    output:
        "results/demos/{demos}/shard-{shard}/manifest.json",
    log:
        "results/demos/{demos}/logs/import_demos-{shard}.log",
    benchmark:
        "results/demos/{demos}/shard-{shard}/import_demos.benchmark.tsv"
    wildcard_constraints:
        demos=".+-(file|published)-.+",
    resources:
        mem=4000,
        runtime=60,
        slurm_extra=slurm(),
    params:
        sources=shard_files,
        task=field("task", run_of_demos),
        robot=field("robot", run_of_demos),
        first_demo=first_demo,
        num_demos=shard_demos,
        on_invalid=field("demos.on_invalid", run_of_demos),
        code=code("data.import_demos"),
    shell:
        "$PYTHON -m demo2eval.data.import_demos --sources {params.sources:q} --task {params.task:q}"
        " --robot {params.robot:q} --first_demo {params.first_demo:q}"
        " --num_demos {params.num_demos:q} --on_invalid {params.on_invalid:q}"
        " --output {output:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule replay:
    input:
        demos_shard,
    output:
        "results/replays/{replay}/shard-{shard}/manifest.json",
    log:
        "results/replays/{replay}/logs/replay-{shard}.log",
    benchmark:
        "results/replays/{replay}/shard-{shard}/replay.benchmark.tsv"
    resources:
        mem=4000,
        runtime=120,
        slurm_extra=slurm(),
    params:
        task=field("task", run_of_replay),
        robot=field("robot", run_of_replay),
        object=field("object", run_of_replay),
        replay=section("replay", run_of_replay),
        on_invalid=replay_on_invalid,
        code=code("data.replay"),
    shell:
        "$PYTHON -m demo2eval.data.replay --demos {input:q} --task {params.task:q}"
        " --robot {params.robot:q} --object {params.object:q} --replay {params.replay:q}"
        " --on_invalid {params.on_invalid:q} --output {output:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"
