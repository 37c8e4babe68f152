"""The typed recipe: its schema, and reading it from YAML."""

from dfkd_dist.config.base import Spec
from dfkd_dist.config.compensation import KDCISpec
from dfkd_dist.config.generative import (
    AdversarySpec,
    AssistantSpec,
    BNTermSpec,
    GenerativeSpec,
    GeneratorLossSpec,
    GeneratorSpec,
)
from dfkd_dist.config.images import AugmentSpec, DatasetSpec, EvaluationSpec, LabelledSpec, SplitSpec
from dfkd_dist.config.inversion import (
    AnySynthesisSpec,
    CompetitionSpec,
    DeepInversionLossSpec,
    DeepInversionSpec,
    InversionSpec,
    PoolSpec,
    StageSpec,
)
from dfkd_dist.config.inversion_cmi import CMILossSpec, CMISpec, InstanceContrastSpec
from dfkd_dist.config.inversion_fast import FastSpec, MetaSpec
from dfkd_dist.config.inversion_latent import LatentLossSpec, LatentSpec
from dfkd_dist.config.inversion_phases import ASSISTANT, HARVEST, SYNTHESIS
from dfkd_dist.config.kd3 import KD3Spec
from dfkd_dist.config.mosaic import DiscriminatorSpec, MosaicLossSpec, MosaicSpec
from dfkd_dist.config.networks import ImageSpec, StudentSpec, TeacherSpec
from dfkd_dist.config.objectives import (
    AnyObjectiveSpec,
    ContrastSpec,
    FitNetSpec,
    NoisySpec,
    ObjectiveSpec,
    SSKDSpec,
)
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
    "ASSISTANT",
    "AdversarySpec",
    "AnyObjectiveSpec",
    "AnySynthesisSpec",
    "AssistantSpec",
    "AugmentSpec",
    "BNTermSpec",
    "CMILossSpec",
    "CMISpec",
    "CacheSpec",
    "CheckpointSpec",
    "CompetitionSpec",
    "ContrastSpec",
    "DatasetSpec",
    "DeepInversionLossSpec",
    "DeepInversionSpec",
    "DiscriminatorSpec",
    "EvaluationSpec",
    "FastSpec",
    "FitNetSpec",
    "GenerativeSpec",
    "GeneratorLossSpec",
    "GeneratorSpec",
    "HARVEST",
    "ImageSpec",
    "InstanceContrastSpec",
    "InversionSpec",
    "KD3Spec",
    "KDCISpec",
    "LabelledSpec",
    "LatentLossSpec",
    "LatentSpec",
    "LogSpec",
    "MeshSpec",
    "MetaSpec",
    "MosaicLossSpec",
    "MosaicSpec",
    "NoisySpec",
    "ObjectiveSpec",
    "OptimizerSpec",
    "PoolSpec",
    "PrecisionSpec",
    "ReaderSpec",
    "Recipe",
    "RecipeError",
    "RoundsSpec",
    "SSKDSpec",
    "SYNTHESIS",
    "ScheduleSpec",
    "SelectionSpec",
    "Spec",
    "SplitSpec",
    "StageSpec",
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
