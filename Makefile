# `make demo` trains VMC on the bundled clip and generates videos with the adapter. If interrupted, it
# continues the next time. `make test` runs all tests except the slow ones (pytest -m slow).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = out/eight-vmc

demo: $(RUN)/done
	$(BIN)/python generate.py --adapter $(RUN)/vmc.safetensors --prompts assets/prompts.txt
	@echo "The clip, the base model and the trained model side by side: $(RUN)/samples/"

$(RUN)/done: $(VENV)/ready
	$(BIN)/python train.py --method vmc --video assets/eight.mp4 --out $(RUN) \
	    --preview-prompt "a red star moving in a figure eight on a grey background" \
	    $$(test -d $(RUN) && echo --resume)
	touch $@

test: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

.PHONY: demo test
