# The workflow: one rule per stage, one file target per artifact. Rules, paths, params and parents all follow from the
# declarations in ziprc/systems/; what a rule asks of a machine follows from its class, the experiment and the site.
#
#   snakemake results/smoke/values/train.parquet      one artifact
#   snakemake all --config experiment=toy             everything of one experiment
#   snakemake --workflow-profile profiles/slurm …     the same on a cluster
#
# What is made from what (written by `make stages`):
#
# ---
#   rule           file under results/{experiment}/     from
#   prompts        prompts/{name}.parquet               the configuration
#   base           checkpoints/{name}/ziprc.json        the configuration
#   rollouts       rollouts/{name}.parquet              prompts, base, train_joint
#   grades         grades/{name}.parquet                rollouts, prompts
#   train_joint    checkpoints/{name}/ziprc.json        base, rollouts, grades, values
#   values         values/{name}.parquet                rollouts, train_joint
#   introspection  introspection/{name}.parquet         rollouts, train_joint
#   baselines      baselines/{name}.parquet             rollouts, grades, base
#   calibration    checkpoints/{name}/calibration.json  rollouts, grades, introspection, prompts, train_joint
#   frontier       frontier.json                        rollouts, grades, introspection, prompts, train_joint, calibration
#   samples        samples/{name}.parquet               prompts, frontier, train_joint, calibration
#   train_critic   checkpoints/{name}/ziprc.json        base, rollouts, grades
#   train_policy   checkpoints/{name}/ziprc.json        the configuration
#   guided         guided/{name}.parquet                the configuration
#   qvalues        qvalues/{name}.parquet               base, rollouts, grades, train_critic
#   train_online   checkpoints/{name}/ziprc.json        the configuration
#   expand         checkpoints/{name}/ziprc.json        the configuration
#   warm_up        checkpoints/{name}/ziprc.json        the configuration
#   rubrics        rubrics/{name}.parquet               prompts
#   assessments    assessments/{name}.parquet           rollouts, prompts, rubrics
#   gradings       gradings/{name}.parquet              prompts, rubrics, rollouts, grades, assessments, base
#   train_grader   checkpoints/{name}/ziprc.json        the configuration
#   evaluate       metrics/{name}.json                  prompts, rollouts, grades, values, introspection, baselines, base, train_joint
#   report         report.html                          evaluate, frontier, train_joint, introspection, rollouts, grades, prompts, samples
# ---

from ziprc.workflow.snakefile import Rules

R = Rules(config, workflow.basedir)

shell.prefix(R.prefix)

# With `make all CONTAINER=…` every stage runs in this image, by Snakemake's apptainer deployment (ziprc/workflow/container.py).
if R.asked.container:

    container: R.asked.container


wildcard_constraints:
    experiment=r"[^/]+",


rule all:
    input:
        R.goals,


for stage in R.stages:

    rule:
        name:
            stage.name
        input:
            R.reads(stage),
        output:
            **{role: update(file) for role, file in R.makes(stage).items()},
        log:
            R.log(stage),
        benchmark:
            R.benchmark(stage)
        wildcard_constraints:
            name=R.names(stage),
        threads: R.threads(stage)
        resources:
            **R.resources(stage),
        params:
            **R.params(stage),
        message:
            R.message(stage)
        shell:
            R.command
