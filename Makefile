# The README's two commands. `make demo` learns a motion from the bundled clip and shows it in
# another thing; `make test` runs every test that needs no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

demo: $(VENV)/ready
	$(BIN)/python train.py --method vmc --video assets/eight.mp4 \
	    --preview-prompt "a red star moving in a figure eight on a grey background"
	$(BIN)/python generate.py --adapter out/eight-vmc/vmc.safetensors --out out/demo \
	    --prompts assets/prompts.txt
	@echo "The clip, the untrained and the trained model side by side: out/eight-vmc/samples/"
	@echo "The new videos: out/demo/, all in one picture: out/demo/sheet.png"

test: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

.PHONY: demo test
