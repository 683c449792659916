"""Whatever is given, a user gets one line that names the culprit and a right exit code, and nothing half-done is left."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app_conftest_types import Workshop
from command_line import Outcome, caravan, listing, run_program
