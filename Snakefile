# The workflow: one rule per stage, one file target per artifact, every path and parameter from ziprc.systems and
# ziprc.config. A rule's params are its own section of config.yaml and a digest of the code that its stage runs, so a
# change reruns just what depends on it; keys under `runtime` are no params. Downstream depends on manifests, which are
# written last and hold no time, so that a rebuilt artifact with the same content reruns nothing below it.
#
#   snakemake results/smoke/values/train.parquet      one artifact
#   snakemake all --config experiment=toy             everything of one experiment
#   snakemake --workflow-profile profiles/slurm …     the same on a cluster

import functools
from pathlib import Path

from ziprc.config import load as settings
from ziprc.plan.code import code_digest
from ziprc.store.layout import Layout, manifest_of
from ziprc.systems.artifacts import artifact_names, parents_of
from ziprc.systems.names import params_of
from ziprc.workflow.needs import (
    check_sites,
    resource_names,
    resources as asked,
    threads as granted,
    trains,
)

CONFIG_FILE = Path(
    config.get("config_file", Path(workflow.basedir) / "config.yaml")
).resolve()
OVERRIDES = str(config.get("set", "")).split()
EXPERIMENT = config.get("experiment", "smoke")
HOME = "results/{experiment}"
SITES = check_sites(config.get("classes", {}))
SET = f"--set {' '.join(OVERRIDES)}" if OVERRIDES else ""
RUN = "python -m ziprc run {rule} --config-file {CONFIG_FILE} --experiment {wildcards.experiment} --threads {threads} {SET} --name "


@functools.cache
def resolved(experiment):
    return settings.load(CONFIG_FILE, experiment, OVERRIDES)


def section(rule, name=None):
    """Params of an artifact; its name is the wildcard unless the rule makes only one."""
    return lambda w: params_of(resolved(w.experiment), rule, name or w.name)


def code(rule):
    return lambda w: code_digest(rule, resolved(w.experiment).prompts.task)


def class_of(wanted, w):
    """The class of machine that a rule wants: `cpu`, `gpu`, `big-gpu`, or what a function of the experiment says."""
    return wanted(resolved(w.experiment)) if callable(wanted) else wanted


def cores(wanted):
    return lambda w: granted(class_of(wanted, w), resolved(w.experiment).runtime, SITES)


def needs(wanted):
    """Resources of a rule; ziprc/workflow/needs.py says how they follow from the class, the experiment and the site."""

    def ask(name):
        return lambda w, attempt: asked(
            class_of(wanted, w), resolved(w.experiment).runtime, SITES, attempt
        ).get(name)

    return {name: ask(name) for name in resource_names(SITES)}


def trained(experiment):
    """`base` trains a model only from scratch; otherwise it copies one."""
    return "big-gpu" if trains("base", experiment) else "cpu"


def judged(experiment):
    """`grades` needs a GPU only for a judge."""
    return "gpu" if experiment.grades.judge else "cpu"


def table(kind, name="{name}"):
    """The two files of a table; the manifest is the one to depend on."""
    artifact = f"{HOME}/{kind}/{name}.parquet"
    return dict(
        table=update(artifact), manifest=update(str(manifest_of(Path(artifact))))
    )


def parents(rule, name=None):
    """The manifests of what an artifact is made from; its name is the wildcard unless the rule makes only one."""

    def manifests(w):
        layout = Layout(Path("results"), w.experiment)
        found = parents_of(resolved(w.experiment), layout, rule, name or w.name)
        return [str(manifest_of(path)) for path in found.values()]

    return manifests


def checkpoint_manifest(name):
    return f"{HOME}/checkpoints/{name}/ziprc.json"


# With `make all CONTAINER=…` every stage runs in this image, by Snakemake's apptainer deployment (ziprc/workflow/container.py).
if "container" in config:

    container: config["container"]


wildcard_constraints:
    experiment=r"[^/]+",
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
    threads: cores("cpu")
    resources:
        **needs("cpu"),
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
    threads: cores(trained)
    resources:
        **needs(trained),
    params:
        section=section("base", "base"),
        code=code("base"),
    message:
        "base: the policy to start from, {wildcards.experiment}"
    shell:
        RUN + "base > {log} 2>&1"


rule rollouts:
    input:
        parents("rollouts"),
    output:
        **table("rollouts"),
    log:
        f"{HOME}/logs/rollouts-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/rollouts-{{name}}.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("rollouts"),
        code=code("rollouts"),
    message:
        "rollouts: responses for {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule grades:
    input:
        parents("grades"),
    output:
        **table("grades"),
    log:
        f"{HOME}/logs/grades-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/grades-{{name}}.tsv"
    threads: cores(judged)
    resources:
        **needs(judged),
    params:
        section=section("grades"),
        code=code("grades"),
    message:
        "grades: is the answer right? {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule train_joint:
    input:
        parents("train_joint"),
    output:
        update(checkpoint_manifest("{name}")),
    log:
        f"{HOME}/logs/train_joint-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/train_joint-{{name}}.tsv"
    wildcard_constraints:
        name=r"noisy(-fold\d+)?|ziprc|lite",
    threads: cores("big-gpu")
    resources:
        **needs("big-gpu"),
    params:
        section=section("train_joint"),
        code=code("train_joint"),
    message:
        "train_joint: the joint head {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule values:
    input:
        parents("values"),
    output:
        **table("values"),
    log:
        f"{HOME}/logs/values-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/values-{{name}}.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("values"),
        code=code("values"),
    message:
        "values: what the critics expect, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule introspection:
    input:
        parents("introspection"),
    output:
        **table("introspection"),
    log:
        f"{HOME}/logs/introspection-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/introspection-{{name}}.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("introspection"),
        code=code("introspection"),
    message:
        "introspection: what {wildcards.name} expects at every token of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule baselines:
    input:
        parents("baselines"),
    output:
        **table("baselines"),
    log:
        f"{HOME}/logs/baselines-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/baselines-{{name}}.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("baselines"),
        code=code("baselines"),
    message:
        "baselines: honest competitors, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule calibration:
    input:
        parents("calibration"),
    output:
        file=update(f"{HOME}/checkpoints/{{name}}/calibration.json"),
        manifest=update(f"{HOME}/checkpoints/{{name}}/calibration.manifest.json"),
    log:
        f"{HOME}/logs/calibration-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/calibration-{{name}}.tsv"
    threads: cores("cpu")
    resources:
        **needs("cpu"),
    params:
        section=section("calibration"),
        code=code("calibration"),
    message:
        "calibration: what samplers of {wildcards.name} need, fitted on validation prompts, {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule frontier:
    input:
        parents("frontier", "frontier"),
    output:
        record=update(f"{HOME}/frontier.json"),
        manifest=update(f"{HOME}/frontier.manifest.json"),
    log:
        f"{HOME}/logs/frontier-frontier.log",
    benchmark:
        f"{HOME}/benchmarks/frontier-frontier.tsv"
    threads: cores("cpu")
    resources:
        **needs("cpu"),
    params:
        section=section("frontier", "frontier"),
        code=code("frontier"),
    message:
        "frontier: accuracy against tokens of all samplers, {wildcards.experiment}"
    shell:
        RUN + "frontier > {log} 2>&1"


rule samples:
    input:
        parents("samples"),
    output:
        **table("samples"),
    log:
        f"{HOME}/logs/samples-{{name}}.log",
    benchmark:
        f"{HOME}/benchmarks/samples-{{name}}.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("samples"),
        code=code("samples"),
    message:
        "samples: adaptive sampling live, {wildcards.name} of {wildcards.experiment}"
    shell:
        RUN + "{wildcards.name} > {log} 2>&1"


rule evaluate:
    input:
        parents("evaluate", "metrics"),
    output:
        metrics=update(f"{HOME}/metrics.json"),
        manifest=update(f"{HOME}/metrics.manifest.json"),
    log:
        f"{HOME}/logs/evaluate-metrics.log",
    benchmark:
        f"{HOME}/benchmarks/evaluate-metrics.tsv"
    threads: cores("gpu")
    resources:
        **needs("gpu"),
    params:
        section=section("evaluate", "metrics"),
        code=code("evaluate"),
    message:
        "evaluate: what the numbers mean, {wildcards.experiment}"
    shell:
        RUN + "metrics > {log} 2>&1"


rule report:
    input:
        parents("report", "report"),
    output:
        page=report(update(f"{HOME}/report.html"), category="report"),
        manifest=update(f"{HOME}/report.manifest.json"),
    log:
        f"{HOME}/logs/report-report.log",
    benchmark:
        f"{HOME}/benchmarks/report-report.tsv"
    threads: cores("cpu")
    resources:
        **needs("cpu"),
    params:
        section=section("report", "report"),
        code=code("report"),
    message:
        "report: the page, {wildcards.experiment}"
    shell:
        RUN + "report > {log} 2>&1"
