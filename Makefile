# From a bare machine with Python 3.11 or newer: `make demo` installs and shows the models that come
# along write, without and with a memory, `make test` installs and runs the tests, `make faults`
# those that are slow by nature: many kills, full disks, long loops. All work in .venv and reuse it.
PYTHON ?= python3
VENV   ?= .venv

demo: $(VENV)/installed
	$(VENV)/bin/python sample.py --prompt "Once upon a time" --threshold 0.999 --compare \
	    --memory checkpoints/stories/metastate.safetensors
	$(VENV)/bin/python sample.py --steps 3 --memory checkpoints/tiny/metastate.safetensors --compare

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests

faults: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q tests -m faults

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: demo test faults
