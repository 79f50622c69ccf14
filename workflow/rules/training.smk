# Training: checkpoint 0, then one job per save interval, each resuming the checkpoint before.


rule init_checkpoint:
    input:
        "results/{run}/norm_stats/manifest.json",
    output:
        "results/{run}/checkpoints/0.json",
    log:
        "results/{run}/logs/init_checkpoint.log",
    benchmark:
        "results/{run}/benchmarks/init_checkpoint.tsv"
    resources:
        mem=request("init_mem"),
        runtime=60,
        slurm_extra=slurm(),
    params:
        task=field("task"),
        prompt=field("prompt"),
        robot=field("robot"),
        seed=field("seed"),
        replay=section("replay"),
        dataset=section("dataset"),
        actions=section("actions"),
        model=section("model"),
        code=code("training.init_checkpoint"),
    shell:
        "$PYTHON -m demo2eval.training.init_checkpoint --norm_stats {input:q} --task {params.task:q}"
        " --prompt {params.prompt:q} --robot {params.robot:q} --seed {params.seed:q}"
        " --replay {params.replay:q} --dataset {params.dataset:q} --actions {params.actions:q}"
        " --model {params.model:q} --output {output:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule train:
    input:
        previous=previous_checkpoint,
        image_cache=image_cache_of_run,
        preflight=ancient("results/{run}/preflight.json"),
    output:
        manifest="results/{run}/checkpoints/{step}.json",
        metrics="results/{run}/checkpoints/{step}/metrics.csv",
    log:
        "results/{run}/logs/train_{step}.log",
    benchmark:
        "results/{run}/benchmarks/train_{step}.tsv"
    wildcard_constraints:
        step=r"[1-9]\d*",
    # A job that is told to stop, or dies, goes on from its last save.
    retries: 2
    threads: 8
    resources:
        gpu=field("training.fsdp_devices"),
        mem=request("train_mem"),
        runtime=request("train_minutes"),
        # The limit is announced while there is time to save.
        slurm_extra=slurm("--signal=TERM@300"),
        # Here and not in params: they make nothing stale.
        micro_batch_size=schedule("training.micro_batch_size"),
        remat=schedule("training.remat"),
        fsdp_devices=schedule("training.fsdp_devices"),
        save_minutes=schedule("training.save_minutes"),
        keep_period=schedule("training.keep_period"),
        tracker=schedule("training.tracker"),
    params:
        # srun, for several processes: a job of SLURM with the resource mpi (docs/cluster.md). What
        # follows from resources makes nothing stale.
        launcher=lambda wildcards, resources: resources.get("mpi", ""),
        seed=field("seed"),
        training=section("training"),
        actions=section("actions"),
        code=code("training.train"),
    shell:
        # The shell and tee outlive a request to stop, so that training can save and say so.
        "trap : TERM; {params.launcher} $PYTHON -m demo2eval.gpus {resources.gpu} $PYTHON"
        " -m demo2eval.training.train --previous {input.previous:q}"
        " --image_cache {input.image_cache:q} --step {wildcards.step:q} --seed {params.seed:q}"
        " --training {params.training:q} --training.micro_batch_size {resources.micro_batch_size}"
        " --training.remat {resources.remat} --training.fsdp_devices {resources.fsdp_devices}"
        " --training.save_minutes {resources.save_minutes}"
        " --training.keep_period {resources.keep_period} --training.tracker {resources.tracker}"
        " --actions {params.actions:q} --output {output.manifest:q}"
        " 2>&1 | (trap '' TERM; $PYTHON -m demo2eval.tee {log:q})"


rule loss_curve:
    input:
        checkpoints=trained_checkpoints,
        metrics=all_metrics,
    output:
        table="results/{run}/metrics.csv",
        curve=in_report("results/{run}/loss.png", "Training", "loss"),
        throughput_table="results/{run}/throughput.csv",
        throughput=in_report("results/{run}/throughput.png", "Training", "throughput"),
    log:
        "results/{run}/logs/loss_curve.log",
    benchmark:
        "results/{run}/benchmarks/loss_curve.tsv"
    localrule: True
    params:
        checkpoints=input_as_json("checkpoints"),
        code=code("training.loss_curve"),
    shell:
        "$PYTHON -m demo2eval.training.loss_curve --run {wildcards.run:q}"
        " --checkpoints {params.checkpoints:q} --table {output.table:q} --curve {output.curve:q}"
        " --throughput_table {output.throughput_table:q} --throughput {output.throughput:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


# Not part of the chain: what keep_period does not keep goes when later checkpoints are trained, and
# here, once all are evaluated.
rule prune:
    log:
        "results/logs/prune.txt",
    localrule: True
    run:
        prune_runs(Path(log[0]))
