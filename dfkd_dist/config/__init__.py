"""The typed recipe: its schema, and reading it from YAML."""

from dfkd_dist.config.base import Spec
from dfkd_dist.config.generative import (
    AdversarySpec,
    AssistantSpec,
    BNTermSpec,
    GenerativeSpec,
    GeneratorLossSpec,
    GeneratorSpec,
)
from dfkd_dist.config.images import AugmentSpec, DatasetSpec, EvaluationSpec, LabelledSpec, SplitSpec
from dfkd_dist.config.networks import ImageSpec, StudentSpec, TeacherSpec
from dfkd_dist.config.objectives import ObjectiveSpec
from dfkd_dist.config.reading import (
    RecipeError,
    apply_override,
    dump,
    find_recipe,
    load_recipe,
    load_teachers_recipe,
    parse,
    read_yaml,
)
from dfkd_dist.config.schema import Recipe
from dfkd_dist.config.streams import CacheSpec, ReaderSpec, SelectionSpec, StreamSpec
from dfkd_dist.config.teachers import TeachersRecipe
from dfkd_dist.config.training import (
    CheckpointSpec,
    LogSpec,
    MeshSpec,
    OptimizerSpec,
    PrecisionSpec,
    RoundsSpec,
    ScheduleSpec,
)

__all__ = [
    "AdversarySpec",
    "AssistantSpec",
    "AugmentSpec",
    "BNTermSpec",
    "CacheSpec",
    "CheckpointSpec",
    "DatasetSpec",
    "EvaluationSpec",
    "GenerativeSpec",
    "GeneratorLossSpec",
    "GeneratorSpec",
    "ImageSpec",
    "LabelledSpec",
    "LogSpec",
    "MeshSpec",
    "ObjectiveSpec",
    "OptimizerSpec",
    "PrecisionSpec",
    "Recipe",
    "ReaderSpec",
    "RecipeError",
    "RoundsSpec",
    "ScheduleSpec",
    "SelectionSpec",
    "Spec",
    "SplitSpec",
    "StreamSpec",
    "StudentSpec",
    "TeacherSpec",
    "TeachersRecipe",
    "apply_override",
    "dump",
    "find_recipe",
    "load_recipe",
    "load_teachers_recipe",
    "parse",
    "read_yaml",
]
