# The workflow: one rule per stage, one file target per artifact, every path and parameter from ziprc.artifacts and
# ziprc.config. A rule's params are its own section of config.yaml and a digest of the code that its stage runs, so a
# change reruns just what depends on it; keys under `runtime` are no params. Downstream depends on manifests, which are
# written last and hold no time, so that a rebuilt artifact with the same content reruns nothing below it.
#
#   snakemake results/smoke/values/train.parquet      one artifact
#   snakemake all --config experiment=toy             everything of one experiment
#   snakemake --workflow-profile profiles/slurm …     the same on a cluster

import functools
from pathlib import Path

from ziprc import config as settings
from ziprc.artifacts import Layout, manifest_of
from ziprc.code import code_digest
from ziprc.plan import artifact_names

CONFIG_FILE = Path(
    config.get("config_file", Path(workflow.basedir) / "config.yaml")
).resolve()
OVERRIDES = str(config.get("set", "")).split()
EXPERIMENT = config.get("experiment", "smoke")
HOME = "results/{experiment}"
SET = f"--set {' '.join(OVERRIDES)}" if OVERRIDES else ""
RUN = "python -m ziprc run {rule} --config-file {CONFIG_FILE} --experiment {wildcards.experiment} --threads {threads} {SET} --name "


@functools.cache
def resolved(experiment):
    return settings.load(CONFIG_FILE, experiment, OVERRIDES)


def section(rule, name=None):
    """Params of an artifact; its name is the wildcard unless the rule makes only one."""
    return lambda w: settings.params_of(resolved(w.experiment), rule, name or w.name)


def code(rule):
    return lambda w: code_digest(rule, resolved(w.experiment).prompts.task)


def runtime(key):
    return lambda w, attempt: getattr(resolved(w.experiment).runtime, key) * (
        attempt if key == "mem_mb" else 1
    )


def table(kind, name="{name}"):
    """The two files of a table; the manifest is the one to depend on."""
    artifact = f"{HOME}/{kind}/{name}.parquet"
    return dict(
        table=update(artifact), manifest=update(str(manifest_of(Path(artifact))))
    )


def manifest(kind, name="{name}"):
    return str(manifest_of(Path(f"{HOME}/{kind}/{name}.parquet")))


def checkpoint_manifest(name):
    return f"{HOME}/checkpoints/{name}/ziprc.json"


# With `make all CONTAINER=…` every stage runs in this image, by Snakemake's apptainer deployment (ziprc/container.py).
if "container" in config:

    container: config["container"]


wildcard_constraints:
    experiment=r"[^/]+",
    head=r"noisy(-fold\d+)?|ziprc|lite",
    name=r"[^/]+",


rule all:
    input:
        lambda w: artifact_names(
            resolved(EXPERIMENT), Layout(Path("results"), EXPERIMENT)
        ),


rule prompts:
    output:
        **table("prompts"),
    log:
        f"{HOME}/logs/prompts-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/prompts-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
    params:
        section=section("prompts"),
        code=code("prompts"),
    message:
        "prompts: what is asked, split {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule base:
    output:
        update(checkpoint_manifest("base")),
    log:
        f"{HOME}/logs/base-base.log",
    benchmark:
        f"{HOME}/benchmarks/base-base.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("base", "base"),
        code=code("base"),
    message:
        "base: the policy to start from, {wildcards.experiment}"
    shell:
        RUN + "base > {log} 2>&1"


rule rollouts:
    input:
        prompts=lambda w: manifest("prompts", settings.prompts_of(w.name)),
        policy=lambda w: checkpoint_manifest(
            settings.policy_of(resolved(w.experiment), w.name)
        ),
    output:
        **table("rollouts"),
    log:
        f"{HOME}/logs/rollouts-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/rollouts-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("rollouts"),
        code=code("rollouts"),
    message:
        "rollouts: responses for {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule grades:
    input:
        prompts=lambda w: manifest("prompts", settings.prompts_of(w.name)),
        rollouts=manifest("rollouts"),
    output:
        **table("grades"),
    log:
        f"{HOME}/logs/grades-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/grades-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("grades"),
        code=code("grades"),
    message:
        "grades: is the answer right? {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


def labels(w):
    """What a head is trained on: scores, or the critics' values."""
    label = settings.head_of(resolved(w.experiment), w.head).label
    return manifest({"score": "grades", "value": "values"}[label], "train")


rule train_joint:
    input:
        base=checkpoint_manifest("base"),
        rollouts=manifest("rollouts", "train"),
        labels=labels,
    output:
        update(checkpoint_manifest("{head}")),
    log:
        f"{HOME}/logs/train_joint-{{head}}.log",
    benchmark:
        f"{HOME}/benchmarks/train_joint-{{head}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=lambda w: settings.params_of(
            resolved(w.experiment), "train_joint", w.head
        ),
        code=code("train_joint"),
    message:
        "train_joint: the joint head {wildcards.head} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.head} > {log} 2>&1"


rule values:
    input:
        rollouts=manifest("rollouts"),
        critics=lambda w: [
            checkpoint_manifest(c) for c in settings.critics(resolved(w.experiment))
        ],
    output:
        **table("values"),
    log:
        f"{HOME}/logs/values-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/values-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("values"),
        code=code("values"),
    message:
        "values: what the critics expect, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule introspection:
    input:
        rollouts=lambda w: manifest("rollouts", settings.introspected(w.name)[0]),
        head=lambda w: checkpoint_manifest(settings.introspected(w.name)[1]),
    output:
        **table("introspection"),
    log:
        f"{HOME}/logs/introspection-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/introspection-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("introspection"),
        code=code("introspection"),
    message:
        "introspection: what {wildcards.name} expects at every token of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule baselines:
    input:
        base=checkpoint_manifest("base"),
        train=[manifest("rollouts", "train"), manifest("grades", "train")],
        test=manifest("rollouts", "{name}"),
    output:
        **table("baselines"),
    log:
        f"{HOME}/logs/baselines-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/baselines-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("baselines"),
        code=code("baselines"),
    message:
        "baselines: honest competitors, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule calibration:
    input:
        prompts=manifest("prompts", "validation"),
        rollouts=manifest("rollouts", "validation-{name}"),
        grades=manifest("grades", "validation-{name}"),
        introspection=manifest("introspection", "validation-{name}"),
        checkpoint=checkpoint_manifest("{name}"),
    output:
        file=update(f"{HOME}/checkpoints/{{name}}/calibration.json"),
        manifest=update(f"{HOME}/checkpoints/{{name}}/calibration.manifest.json"),
    log:
        f"{HOME}/logs/calibration-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/calibration-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
    params:
        section=section("calibration"),
        code=code("calibration"),
    message:
        "calibration: what samplers of {wildcards.name} need, fitted on validation prompts, {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule frontier:
    input:
        prompts=[manifest("prompts", n) for n in ("validation", "test")],
        rollouts=[manifest("rollouts", n) for n in settings.POOLS],
        grades=[manifest("grades", n) for n in settings.POOLS],
        introspection=[manifest("introspection", n) for n in settings.POOLS],
        calibration=f"{HOME}/checkpoints/ziprc/calibration.manifest.json",
    output:
        record=update(f"{HOME}/frontier.json"),
        manifest=update(f"{HOME}/frontier.manifest.json"),
    log:
        f"{HOME}/logs/frontier-frontier.log",
    benchmark:
        f"{HOME}/benchmarks/frontier-frontier.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
    params:
        section=section("frontier", "frontier"),
        code=code("frontier"),
    message:
        "frontier: accuracy against tokens of all samplers, {wildcards.experiment}"
    shell:
        RUN + "frontier > {log} 2>&1"


rule samples:
    input:
        prompts=manifest("prompts", "test"),
        checkpoint=checkpoint_manifest("ziprc"),
        calibration=f"{HOME}/checkpoints/ziprc/calibration.manifest.json",
        frontier=f"{HOME}/frontier.manifest.json",
    output:
        **table("samples"),
    log:
        f"{HOME}/logs/samples-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/samples-{{name}}.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("samples"),
        code=code("samples"),
    message:
        "samples: adaptive sampling live, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


def heads(w):
    return ["ziprc"] + (["lite"] if resolved(w.experiment).train_joint.lite else [])


rule evaluate:
    input:
        prompts=manifest("prompts", "test"),
        checkpoints=[checkpoint_manifest("base"), checkpoint_manifest("ziprc")],
        rollouts=[
            manifest("rollouts", n)
            for n in ("train", "test", "test-many", "test-ziprc")
        ],
        grades=[manifest("grades", n) for n in ("train", "test", "test-ziprc")],
        values=[manifest("values", n) for n in ("train", "test-many")],
        introspection=lambda w: [manifest("introspection", head) for head in heads(w)],
        baselines=manifest("baselines", "test"),
    output:
        metrics=update(f"{HOME}/metrics.json"),
        manifest=update(f"{HOME}/metrics.manifest.json"),
    log:
        f"{HOME}/logs/evaluate-metrics.log",
    benchmark:
        f"{HOME}/benchmarks/evaluate-metrics.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
        gpus=runtime("gpus"),
    params:
        section=section("evaluate", "metrics"),
        code=code("evaluate"),
    message:
        "evaluate: what the numbers mean, {wildcards.experiment}"
    shell:
        RUN + "metrics > {log} 2>&1"


rule report:
    input:
        metrics=f"{HOME}/metrics.manifest.json",
        frontier=f"{HOME}/frontier.manifest.json",
        samples=lambda w: [
            manifest("samples", policy)
            for policy in resolved(w.experiment).samples.policies
        ],
    output:
        page=report(update(f"{HOME}/report.html"), category="report"),
        manifest=update(f"{HOME}/report.manifest.json"),
    log:
        f"{HOME}/logs/report-report.log",
    benchmark:
        f"{HOME}/benchmarks/report-report.tsv"
    resources:
        mem_mb=runtime("mem_mb"),
        runtime=runtime("runtime_min"),
    params:
        section=section("report", "report"),
        code=code("report"),
    message:
        "report: the page, {wildcards.experiment}"
    shell:
        RUN + "report > {log} 2>&1"
