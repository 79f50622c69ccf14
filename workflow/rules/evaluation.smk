# Evaluation: rollouts of each checkpoint on the same seeds, the table and curve, and a video of the last checkpoint.


rule rollout:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        dataset=lambda wildcards: f"results/datasets/{dataset_name(wildcards.run)}/manifest.json",
    output:
        "results/{run}/rollouts/{step}.json",
    log:
        "results/{run}/logs/rollout_{step}.log",
    threads: lambda wildcards: settings(wildcards.run)["evaluation"]["workers"]
    resources:
        gpu=1,
        simulators=lambda wildcards: settings(wildcards.run)["evaluation"]["workers"],
    params:
        options=lambda wildcards: options(rollout_settings(wildcards.run)),
        code=code("evaluation.rollout"),
    shell:
        "{JAX_PYTHON} -m demo2eval.evaluation.rollout {params.options} --checkpoint {input.checkpoint} --dataset {input.dataset}"
        " --output {output} --workers {resources.simulators} 2>&1 | tee {log}"


rule video:
    input:
        "results/{run}/checkpoints/{step}.json",
    output:
        "results/{run}/videos/{step}.json",
    log:
        "results/{run}/logs/video_{step}.log",
    threads: 2
    resources:
        gpu=1,
    params:
        options=lambda wildcards: options(video_settings(wildcards.run)),
        code=code("evaluation.video"),
    shell:
        "{JAX_PYTHON} -m demo2eval.evaluation.video {params.options} --checkpoint {input} --output {output} --workers {threads} 2>&1 | tee {log}"


rule success_table:
    input:
        rollouts=lambda wildcards: [f"results/{wildcards.run}/rollouts/{step}.json" for step in steps_of(settings(wildcards.run))],
        video=lambda wildcards: f"results/{wildcards.run}/videos/{steps_of(settings(wildcards.run))[-1]}.json",
    output:
        table="results/{run}/success.csv",
        curve="results/{run}/success.png",
        stages="results/{run}/stages.csv",
    log:
        "results/{run}/logs/success_table.log",
    params:
        code=code("evaluation.success_table"),
    shell:
        "{PYTHON} -m demo2eval.evaluation.success_table --run {wildcards.run} --inputs {input.rollouts}"
        " --table {output.table} --curve {output.curve} --stages {output.stages} 2>&1 | tee {log}"


# Not part of the chain: for finding out why a run fails.


rule video_of_failures:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        rollouts="results/{run}/rollouts/{step}.json",
    output:
        "results/{run}/failures/{step}.json",
    log:
        "results/{run}/logs/video_of_failures_{step}.log",
    threads: 2
    resources:
        gpu=1,
    params:
        options=lambda wildcards: options(video_settings(wildcards.run)),
        code=code("evaluation.video"),
    shell:
        "{JAX_PYTHON} -m demo2eval.evaluation.video {params.options} --checkpoint {input.checkpoint} --failures-of {input.rollouts}"
        " --output {output} --workers {threads} 2>&1 | tee {log}"


rule action_error:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        cache=lambda wildcards: f"results/caches/{cache_name(wildcards.run)}/manifest.json",
    output:
        "results/{run}/action_errors/{step}.json",
    log:
        "results/{run}/logs/action_error_{step}.log",
    threads: 2
    resources:
        gpu=1,
    params:
        options=lambda wildcards: options(action_error_settings(wildcards.run)),
        code=code("evaluation.action_error"),
    shell:
        "{JAX_PYTHON} -m demo2eval.evaluation.action_error {params.options} --checkpoint {input.checkpoint} --cache {input.cache}"
        " --output {output} 2>&1 | tee {log}"
