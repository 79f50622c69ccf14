# Evaluation: rollouts of each checkpoint on the same seeds, the table, the curve and a video.


# Training and rollouts wait for it; what it finds anew makes nothing stale (ancient).
rule preflight:
    input:
        checkpoint="results/{run}/checkpoints/0.json",
        dataset=dataset_of_run,
        image_cache=image_cache_of_run,
    output:
        "results/{run}/preflight.json",
    log:
        "results/{run}/logs/preflight.log",
    benchmark:
        "results/{run}/benchmarks/preflight.tsv"
    threads: field("evaluation.num_workers")
    resources:
        mem=16000,
        runtime=60,
        slurm_extra=slurm(),
        min_demo_success=schedule("evaluation.min_demo_success"),
    params:
        task=field("task"),
        object=field("object"),
        joint_perturbation=field("replay.joint_perturbation"),
        evaluation=section("evaluation"),
        code=code("evaluation.preflight"),
    shell:
        "$PYTHON -m demo2eval.evaluation.preflight --checkpoint {input.checkpoint:q}"
        " --dataset {input.dataset:q} --image_cache {input.image_cache:q} --task {params.task:q}"
        " --object {params.object:q} --joint_perturbation {params.joint_perturbation}"
        " --evaluation {params.evaluation:q}"
        " --evaluation.min_demo_success {resources.min_demo_success}"
        " --evaluation.num_workers {threads} --output {output:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule rollout:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        dataset=dataset_of_run,
        preflight=ancient("results/{run}/preflight.json"),
    output:
        manifest="results/{run}/rollouts/{step}.json",
        episodes="results/{run}/rollouts/{step}.csv",
    log:
        "results/{run}/logs/rollout_{step}.log",
    benchmark:
        "results/{run}/benchmarks/rollout_{step}.tsv"
    # Before further training: a checkpoint's success, and every fault of evaluation, is seen at once.
    priority: 100
    threads: field("evaluation.num_workers")
    resources:
        gpu=1,
        mem=request("rollout_mem"),
        runtime=request("rollout_minutes"),
        # In SLURM's queue after training, which is what others wait for.
        slurm_extra=slurm("--nice=100"),
    params:
        task=field("task"),
        object=field("object"),
        milestones=section("milestones"),
        evaluation=section("evaluation"),
        code=code("evaluation.rollout"),
    shell:
        "$PYTHON -m demo2eval.gpus {resources.gpu} $PYTHON -m demo2eval.evaluation.rollout"
        " --checkpoint {input.checkpoint:q}"
        " --dataset {input.dataset:q} --task {params.task:q} --object {params.object:q}"
        " --milestones {params.milestones:q} --evaluation {params.evaluation:q}"
        " --evaluation.num_workers {threads} --output {output.manifest:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule video:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        rollouts=[],
    output:
        manifest="results/{run}/videos/{step}.json",
        video="results/{run}/videos/{step}.mp4",
        page=in_report("results/{run}/videos/{step}.html", "Videos", "video"),
    log:
        "results/{run}/logs/video_{step}.log",
    benchmark:
        "results/{run}/benchmarks/video_{step}.tsv"
    threads: 2
    resources:
        gpu=1,
        mem=request("rollout_mem"),
        runtime=60,
        slurm_extra=slurm("--nice=100"),
    params:
        task=field("task"),
        object=field("object"),
        milestones=section("milestones"),
        evaluation=section("evaluation"),
        num_videos=field("evaluation.num_videos"),
        rollouts=lambda wildcards, input: input.get("rollouts") or "null",
        code=code("evaluation.video"),
    shell:
        "$PYTHON -m demo2eval.gpus {resources.gpu} $PYTHON -m demo2eval.evaluation.video"
        " --checkpoint {input.checkpoint:q} --task {params.task:q}"
        " --object {params.object:q} --milestones {params.milestones:q}"
        " --evaluation {params.evaluation:q} --evaluation.num_videos {params.num_videos:q}"
        " --evaluation.num_workers {threads} --rollouts {params.rollouts:q}"
        " --output {output.manifest:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule success_table:
    input:
        rollouts=all_rollouts,
        video=last_video,
        loss_curve="results/{run}/loss.png",
        contact_sheet="results/{run}/dataset/contact_sheet.png",
    output:
        table=in_report("results/{run}/success.csv", "Success", "success table"),
        curve=in_report("results/{run}/success.png", "Success", "success"),
        milestones="results/{run}/milestones.csv",
        milestone_curve=in_report("results/{run}/milestones.png", "Success", "milestones"),
        provenance=in_report("results/{run}/provenance.html", "Provenance", "provenance"),
    log:
        "results/{run}/logs/success_table.log",
    benchmark:
        "results/{run}/benchmarks/success_table.tsv"
    localrule: True
    params:
        rollouts=input_as_json("rollouts"),
        published=lambda wildcards: json.dumps(get_run(wildcards.run).published),
        code=code("evaluation.success_table"),
    shell:
        "$PYTHON -m demo2eval.evaluation.success_table --run {wildcards.run:q}"
        " --rollouts {params.rollouts:q} --published {params.published:q}"
        " --table {output.table:q} --curve {output.curve:q}"
        " --milestones {output.milestones:q} --milestone_curve {output.milestone_curve:q}"
        " --provenance {output.provenance:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


# Not part of the chain: several runs side by side, and why a run fails.


# results/comparisons/<run>+<run>.csv
rule comparison:
    input:
        rollouts_of_runs,
    output:
        table="results/comparisons/{runs}.csv",
        figure=report(
            "results/comparisons/{runs}.png",
            caption="../report/comparison.rst",
            category="All runs",
            labels={"figure": "comparison", "runs": "{runs}"},
        ),
    log:
        "results/comparisons/{runs}.log",
    benchmark:
        "results/comparisons/{runs}.tsv"
    localrule: True
    params:
        rollouts=as_json,
        code=code("evaluation.comparison"),
    shell:
        "$PYTHON -m demo2eval.evaluation.comparison --rollouts {params.rollouts:q}"
        " --table {output.table:q} --figure {output.figure:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


rule success_curves:
    input:
        finished_tables,
    output:
        table="results/success_curves.csv",
        curves=report(
            "results/success_curves.png",
            caption="../report/success_curves.rst",
            category="All runs",
            labels={"figure": "success of all runs"},
        ),
    log:
        "results/logs/success_curves.log",
    benchmark:
        "results/logs/success_curves.tsv"
    localrule: True
    params:
        tables=as_json,
        tasks=json.dumps({name: run.task for name, run in RUNS.items()}),
        published=json.dumps({run.task: run.published for run in RUNS.values()}),
        code=code("evaluation.success_curves"),
    shell:
        "$PYTHON -m demo2eval.evaluation.success_curves --tables {params.tables:q}"
        " --tasks {params.tasks:q} --published {params.published:q} --table {output.table:q}"
        " --curves {output.curves:q} 2>&1 | $PYTHON -m demo2eval.tee {log:q}"


# All that a report shows of the finished runs: snakemake report --report report.html
rule report:
    input:
        "results/success_curves.png",
        failure_pages,


use rule video as failure_video with:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        rollouts="results/{run}/rollouts/{step}.json",
    output:
        manifest="results/{run}/failures/{step}.json",
        video="results/{run}/failures/{step}.mp4",
        page=in_report("results/{run}/failures/{step}.html", "Videos", "failures"),
    log:
        "results/{run}/logs/failure_video_{step}.log",
    benchmark:
        "results/{run}/benchmarks/failure_video_{step}.tsv"


rule action_error:
    input:
        checkpoint="results/{run}/checkpoints/{step}.json",
        image_cache=image_cache_of_run,
    output:
        manifest="results/{run}/action_errors/{step}.json",
        table="results/{run}/action_errors/{step}.csv",
    log:
        "results/{run}/logs/action_error_{step}.log",
    benchmark:
        "results/{run}/benchmarks/action_error_{step}.tsv"
    threads: 2
    resources:
        gpu=1,
        mem=request("rollout_mem"),
        runtime=60,
        slurm_extra=slurm("--nice=100"),
    params:
        num_val_demos=field("training.num_val_demos"),
        evaluation=section("evaluation"),
        code=code("evaluation.action_error"),
    shell:
        "$PYTHON -m demo2eval.gpus {resources.gpu} $PYTHON -m demo2eval.evaluation.action_error"
        " --checkpoint {input.checkpoint:q}"
        " --image_cache {input.image_cache:q} --num_val_demos {params.num_val_demos:q}"
        " --evaluation {params.evaluation:q} --output {output.manifest:q}"
        " 2>&1 | $PYTHON -m demo2eval.tee {log:q}"
