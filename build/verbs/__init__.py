"""What tasks.py calls: a file for each verb, or for a family of them."""

from __future__ import annotations

from build.verbs import build as build
from build.verbs import checks as checks
from build.verbs import clean as clean
from build.verbs import completion as completion
from build.verbs import convert as convert
from build.verbs import doctor as doctor
from build.verbs import enter as enter
from build.verbs import inspect as inspect
from build.verbs import jobs as jobs
from build.verbs import lock as lock
from build.verbs import manual as manual
from build.verbs import outdated as outdated
from build.verbs import params as params
from build.verbs import register as register
from build.verbs import rehearse as rehearse
from build.verbs import repair as repair
from build.verbs import repro as repro
from build.verbs import show as show
from build.verbs import verify as verify
