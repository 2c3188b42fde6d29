"""The sections of rubric reward models: rubrics, the teacher's assessments, what a grader is asked, and graders."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ziprc.config.base import DType, LearningRate, Name, Optimisation, Section, Unit, laid_beneath


class Writer(Section):
    """A language model that writes, through the engine of the rollouts."""

    model: str = Field(description="Hub id or local folder")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub; null: the newest")
    max_new_tokens: int = Field(2048, ge=1, description="tokens of what it writes")
    max_model_len: int = Field(16384, ge=2, description="tokens of prompt and text together, at most")
    dtype: DType = Field("auto", description="precision of weights and arithmetic")


class Rubrics(Section):
    """What full marks are given for."""

    source: Literal["program", "column", "model"] = Field(
        "program",
        description="the task's own program; a column of the data set (`criteria` in a prompt's extra); a model",
    )
    writer: Writer | None = Field(None, description="source model: who writes them")
    tries: int = Field(
        3, ge=1, description="source model: times that an invalid rubric is written anew, with other seeds"
    )
    max_invalid: Unit = Field(0.0, description="share of invalid rubrics above which the stage fails")

    @model_validator(mode="after")
    def _has_writer(self) -> Rubrics:
        if (self.source == "model") != (self.writer is not None):
            raise ValueError("source: model and a writer belong together")
        return self


class Assessments(Section):
    """The teacher's assessments of whole responses, by which graders are taught and policies judged."""

    teacher: Writer | None = Field(None, description="a model; null: the task's own program")
    max_unparseable: Unit = Field(
        0.05, description="share of unreadable totals of a teacher above which the stage fails"
    )


class Gradings(Section):
    """What a grader is asked, and how much it may write."""

    responses: int = Field(8, ge=1, description="responses to a prompt that a grader is taught with, at most")
    max_new_tokens: int = Field(96, ge=1, description="tokens of an assessment")
    max_model_len: int = Field(512, ge=2, description="tokens of question and assessment together, at most")
    dtype: DType = Field("float32", description="precision in which a grader runs")


class Grader(Optimisation):
    """A model that is taught to write the teacher's assessments."""

    learning_rate: LearningRate = 1e-5
    tokens: Annotated[int, Field(ge=1)] = Field(500_000, description="tokens that are learned from")
    batch_tokens: int = Field(2048, ge=1, description="tokens per optimizer step over all processes, at least")


class TrainGrader(Section):
    """Graders, each taught from the base."""

    defaults: Grader | None = Field(None, exclude=True, description="settings that lie beneath those of every grader")
    graders: dict[Name, Grader] = Field({}, description="by name; its checkpoint is grader-<name>")

    @model_validator(mode="before")
    @classmethod
    def _lay_defaults_beneath(cls, given: Any) -> Any:
        return laid_beneath(given, "graders", Grader)


class RubricSections(Section):
    """The sections of the system."""

    rubrics: Rubrics = Rubrics()
    assessments: Assessments = Assessments()
    gradings: Gradings = Gradings()
    train_grader: TrainGrader = TrainGrader()
