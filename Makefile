# The README's two commands. `make demo` learns a motion from the bundled clip and shows it in
# another thing, and goes on where it was stopped; `make test` runs every test that needs neither a
# GPU nor many minutes (those: pytest -m slow).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = out/eight-vmc

demo: $(RUN)/done
	$(BIN)/python generate.py --adapter $(RUN)/vmc.safetensors --out out/demo --overwrite \
	    --prompts assets/prompts.txt
	@echo "The clip, the untrained and the trained model side by side: $(RUN)/samples/"
	@echo "The new videos: out/demo/, all in one picture: out/demo/sheet.png"

$(RUN)/done: $(VENV)/ready
	$(BIN)/python train.py --method vmc --video assets/eight.mp4 --out $(RUN) \
	    --preview-prompt "a red star moving in a figure eight on a grey background" \
	    $$(test -f $(RUN)/state.pt && echo --resume || echo --overwrite)
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
