"""The settings of an experiment: their declarations, and the sources that their values come from."""

from kd.settings.declaration import Phase
from kd.settings.help import markdown_table
from kd.settings.schema import (
    PUBLISHED,
    ObjectiveSettings,
    Settings,
    field_type,
    per_machine_settings,
    searchable_settings,
    setting_fields,
    settings_affecting,
    unsupported_by_streams,
)
from kd.settings.sources import CONFIG_FILE, Resolved, resolve, with_origin, write_config
from kd.settings.yaml_files import read_yaml
