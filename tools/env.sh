#!/bin/sh
# Make or complete the environment.   usage: sh tools/env.sh FOLDER EXTRAS        (EXTRAS: "" or "lab,dev", as in settings.ini)
# PYTHON=/path/to/python chooses the interpreter of a new environment.
set -eu
venv=$1 extras=${2:-}
fail() { echo "error: $*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if ! recent "$venv/bin/python"; then
  [ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || fail "$venv is there and is no Python environment: move it away"
  found=
  for python in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if recent "$python"; then found=$python; break; fi
  done
  [ -n "$found" ] || fail "Python 3.11 or newer is needed, and ${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>&1 | tail -1 || true): install one, or say PYTHON=/path/to/python"
  echo "== a new environment in $venv, with $("$found" -V)"
  rm -rf "$venv"
  "$found" -m venv "$venv" || { rm -rf "$venv"; fail "'$found -m venv' does not work here: on Debian and Ubuntu, apt install python3-venv"; }
fi

echo "== installing sdcourse${extras:+ with $extras} (the first time this fetches torch: a few minutes)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install -c constraints.txt -e ".${extras:+[$extras]}" || fail "pip could not install everything (its last lines say why); run the same make command again when that is mended"
pwd > "$venv/.here"
