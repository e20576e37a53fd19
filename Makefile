# sdcourse: `make train` and `make test` are the two that matter; `make help` lists the rest.
# GNU make 3.81 is enough. Everything is installed into .venv and nowhere else.
#   PYTHON=/path/to/python3.12   the interpreter of a new environment
#   NB=nbs/x.ipynb               the notebook for text, nb, outputs, fresh, shot, page
#   ARGS="..."                   more options for train, test (pytest), lab

VENV = .venv
PY = $(VENV)/bin/python
CURRENT = $(if $(wildcard $(VENV)/.dev),$(PY),python)
PACKAGING = settings.ini setup.py pyproject.toml constraints.txt

# A checkout that was moved is installed again: an editable install points to a folder.
ifneq ("$(shell cat $(VENV)/.here 2>/dev/null)","$(CURDIR)")
MOVED = moved
endif

.PHONY: help train test test-slurm lab check sync fresh outputs readme text nb mutants shot page budgets ablations log lock clean moved

help:          ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

train: $(VENV)/.base  ## install if needed, then train the tiny flow DiT on real handwritten digits
	$(PY) -m sdcourse.train flow_dit --preset tiny $(ARGS)

test: $(VENV)/.dev    ## install if needed, then check, run every notebook, run every test
	$(PY) tools/test.py $(ARGS)

test-slurm: $(VENV)/.dev ## the tests on a real SLURM of two nodes (root; apt-get install slurm-wlm munge)
	$(PY) tools/test.py slurm $(ARGS)

lab: $(VENV)/.dev     ## JupyterLab on the lessons
	$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) nbs/00_diffusion.ipynb

check: $(VENV)/.dev   ## export in sync, notebooks clean, outputs fresh, README fresh, ruff
	$(PY) tools/in_step.py

sync: $(VENV)/.dev    ## mend what check finds: export, clean, run stale notebooks, write README, lay out tools and tests
	$(PY) -m ruff format --quiet tools tests
	$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	$(PY) tools/outputs.py write $(NB)
	$(PY) tools/readme.py

outputs: $(VENV)/.dev ## run notebooks and store their outputs: those with changed code, or NB=
	$(PY) tools/outputs.py write $(NB)

fresh: $(VENV)/.dev   ## run every notebook (or NB=) again and compare with what is stored
	$(PY) tools/outputs.py check $(NB)

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	$(PY) tools/readme.py

text:          ## NB=nbs/x.ipynb -> .nbtext/x.py, to edit as text
	@$(CURRENT) tools/text.py out "$(NB)"

nb:            ## .nbtext/x.py -> NB=nbs/x.ipynb; keeps cell ids and outputs
	@$(CURRENT) tools/text.py in "$(NB)"

mutants: $(VENV)/.dev ## plant known bugs; each must turn a test red
	$(PY) tests/mutants.py $(ARGS)

shot: $(VENV)/.dev    ## NB= run in a real JupyterLab, pictures of the whole page into build/shots
	$(PY) tools/lab_shot.py "$(NB)"

page: $(VENV)/.dev    ## NB= as one HTML page and its pictures in build/page; nothing runs
	$(PY) tools/page.py "$(NB)"

budgets: $(VENV)/.base ## import times and sizes beside their budgets
	$(PY) tools/budgets.py

ablations: $(VENV)/.dev ## train again what the lessons show from recorded runs (an hour); done ones are kept: remove nbs/recorded/*.json first
	$(PY) tools/record_sd15.py
	$(PY) tools/record_costs.py

log:           ## the findings, newest first (headings of log/); WORD=cache: only those with that word
	@sed -n 's/^## //p' $$(ls -r log/*.md) | grep -i -e "$(WORD)" || true

lock: $(VENV)/.dev    ## write constraints.txt from this environment
	$(PY) tools/lock.py

clean:         ## remove what can be made again, but not the environment and no runs
	rm -rf build dist .pytest_cache .ruff_cache .nbtext
	find sdcourse nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(VENV)/.base: $(PACKAGING) $(MOVED)
	@PYTHON="$(PYTHON)" sh tools/env.sh $(VENV) ""
	@touch $@

$(VENV)/.dev: $(PACKAGING) $(MOVED)
	@PYTHON="$(PYTHON)" sh tools/env.sh $(VENV) lab,track,dev
	@touch $(VENV)/.base $@
