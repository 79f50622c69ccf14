# LeRobot dataset, norm stats, and the decoded pictures that training reads.


rule dataset:
    input:
        shards("replays", replay_name),
    output:
        "results/datasets/{dataset}/manifest.json",
    log:
        "results/datasets/{dataset}/dataset.log",
    threads: 8
    params:
        options=lambda wildcards: options(dataset_settings(run_of(dataset_name, wildcards.dataset))),
        code=code("data.dataset"),
    shell:
        "{PYTHON} -m demo2eval.data.dataset {params.options} --inputs {input} --output {output} --workers {threads} 2>&1 | tee {log}"


rule norm_stats:
    input:
        lambda wildcards: f"results/datasets/{dataset_name(wildcards.run)}/manifest.json",
    output:
        "results/{run}/norm_stats/manifest.json",
    log:
        "results/{run}/norm_stats/norm_stats.log",
    params:
        options=lambda wildcards: options(norm_stats_settings(wildcards.run)),
        code=code("data.norm_stats"),
    shell:
        "{PYTHON} -m demo2eval.data.norm_stats {params.options} --input {input} --output {output} 2>&1 | tee {log}"


rule training_cache:
    input:
        lambda wildcards: f"results/datasets/{dataset_name(run_of(cache_name, wildcards.cache))}/manifest.json",
    output:
        "results/caches/{cache}/manifest.json",
    log:
        "results/caches/{cache}/training_cache.log",
    threads: 8
    params:
        options=lambda wildcards: options(cache_settings(run_of(cache_name, wildcards.cache))),
        code=code("data.image_cache"),
    shell:
        "{PYTHON} -m demo2eval.data.image_cache {params.options} --input {input} --output {output} --workers {threads}"
        " 2>&1 | tee {log}"
