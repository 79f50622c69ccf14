# Training: step 0, then one segment a checkpoint, each resuming the one before.


rule init_checkpoint:
    input:
        norm_stats="results/{run}/norm_stats/manifest.json",
    output:
        "results/{run}/checkpoints/0.json",
    log:
        "results/{run}/logs/init_checkpoint.log",
    params:
        options=lambda wildcards: options(init_settings(wildcards.run)),
        code=code("training.init_checkpoint"),
    shell:
        "{JAX_PYTHON} -m demo2eval.training.init_checkpoint {params.options} --norm-stats {input.norm_stats} --output {output}"
        " 2>&1 | tee {log}"


rule train_segment:
    input:
        previous=previous_checkpoint,
        cache=lambda wildcards: f"results/caches/{cache_name(wildcards.run)}/manifest.json",
    output:
        "results/{run}/checkpoints/{step}.json",
    log:
        "results/{run}/logs/train_segment_{step}.log",
    wildcard_constraints:
        step=r"[1-9]\d*",
    priority: 100
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        options=lambda wildcards: options({"to_step": int(wildcards.step)} | training_settings(wildcards.run)),
        code=code("training.train"),
    shell:
        "{JAX_PYTHON} -m demo2eval.training.train {params.options} --previous {input.previous} --cache {input.cache}"
        " --output {output} 2>&1 | tee {log}"
