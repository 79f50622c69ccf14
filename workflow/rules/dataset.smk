# The LeRobot dataset, its norm stats, and the decoded images that training reads.


rule dataset:
    input:
        replay_shards,
    output:
        "results/datasets/{dataset}/manifest.json",
    log:
        "results/datasets/{dataset}/logs/dataset.log",
    benchmark:
        "results/datasets/{dataset}/dataset.benchmark.tsv"
    threads: 8
    resources:
        mem=16000,
        runtime=120,
        slurm_extra=slurm(),
    params:
        replays=as_json,
        prompt=field("prompt", run_of_dataset),
        num_demos=field("demos.num_demos", run_of_dataset),
        on_invalid=field("demos.on_invalid", run_of_dataset),
        dataset=section("dataset", run_of_dataset),
        code=code("data.dataset"),
    shell:
        "$PYTHON -m demo2eval.data.dataset --replays {params.replays:q} --prompt {params.prompt:q}"
        " --num_demos {params.num_demos:q} --on_invalid {params.on_invalid:q}"
        " --dataset {params.dataset:q} --num_workers {threads} --output {output:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule norm_stats:
    input:
        dataset_of_run,
    output:
        manifest="results/{run}/norm_stats/manifest.json",
        norm_stats="results/{run}/norm_stats/norm_stats.json",
        ranges="results/{run}/norm_stats/ranges.csv",
    log:
        "results/{run}/logs/norm_stats.log",
    benchmark:
        "results/{run}/benchmarks/norm_stats.tsv"
    resources:
        mem=8000,
        runtime=60,
        slurm_extra=slurm(),
    params:
        actions=section("actions"),
        code=code("data.norm_stats"),
    shell:
        "$PYTHON -m demo2eval.data.norm_stats --dataset {input:q} --actions {params.actions:q}"
        " --output {output.manifest:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule dataset_figures:
    input:
        dataset=dataset_of_run,
        norm_stats="results/{run}/norm_stats/manifest.json",
        image_cache=image_cache_of_run,
    output:
        contact_sheet=in_report(
            "results/{run}/dataset/contact_sheet.png", "Dataset", "contact sheet"
        ),
        histograms=in_report(
            "results/{run}/dataset/action_histograms.png", "Dataset", "action histograms"
        ),
        lengths=in_report("results/{run}/dataset/demo_lengths.png", "Dataset", "demo lengths"),
        tables=multiext("results/{run}/dataset/", "action_histograms.csv", "demo_lengths.csv"),
    log:
        "results/{run}/logs/dataset_figures.log",
    benchmark:
        "results/{run}/benchmarks/dataset_figures.tsv"
    resources:
        mem=8000,
        runtime=30,
        slurm_extra=slurm(),
    params:
        folder=subpath(output.contact_sheet, parent=True),
        cameras=lambda wildcards: json.dumps(
            sorted(set(get_run(wildcards.run).replay.cameras.values()))
        ),
        image_size=lambda wildcards: get_run(wildcards.run).pi0_config().siglip.image_size,
        max_episode_steps=field("evaluation.max_episode_steps"),
        actions=section("actions"),
        code=code("data.dataset_figures"),
    shell:
        "$PYTHON -m demo2eval.data.dataset_figures --dataset {input.dataset:q}"
        " --norm_stats {input.norm_stats:q} --image_cache {input.image_cache:q}"
        " --folder {params.folder:q} --cameras {params.cameras:q} --image_size {params.image_size}"
        " --max_episode_steps {params.max_episode_steps} --actions {params.actions:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule image_cache:
    input:
        dataset_of_cache,
    output:
        "results/image_caches/{cache}/manifest.json",
    log:
        "results/image_caches/{cache}/logs/image_cache.log",
    benchmark:
        "results/image_caches/{cache}/image_cache.benchmark.tsv"
    threads: 8
    resources:
        mem=16000,
        runtime=60,
        slurm_extra=slurm(),
    params:
        image_size=lambda wildcards: run_of_image_cache(wildcards).pi0_config().siglip.image_size,
        code=code("data.image_cache"),
    shell:
        "$PYTHON -m demo2eval.data.image_cache --dataset {input:q} --image_size {params.image_size:q}"
        " --num_workers {threads} --output {output:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"
