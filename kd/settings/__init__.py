"""The settings of an experiment: their declarations, and the sources that their values come from."""

from kd.settings.schema import (
    DataSettings,
    MachineSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizationSettings,
    Phase,
    PhaseSettings,
    Settings,
    SourceSettings,
    check_ranges,
    markdown_table,
    setting_fields,
)

__all__ = [
    "DataSettings",
    "MachineSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizationSettings",
    "Phase",
    "PhaseSettings",
    "Settings",
    "SourceSettings",
    "check_ranges",
    "markdown_table",
    "setting_fields",
]
