"""``--format ollama``: a GGUF with the Modelfile that makes a model of it in Ollama."""

from pathlib import Path

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.export.formats.format import Written
from lowmem_rlhf.export.formats.gguf import GGUFFormat
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.progress import message


class OllamaFormat(GGUFFormat):
    """A GGUF in every respect, with a Modelfile beside it: the chat template, and sampling as in the run."""

    name = "ollama"

    def write(self, job: ExportJob, folder: Path) -> Written:
        """Write the GGUF, and the Modelfile from the tokenizer of the merged weights."""
        from lowmem_rlhf.export.ollama.write import write_ollama

        written = super().write(job, folder)
        g = job.recipe.generation
        sampling = {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k, "min_p": g.min_p}
        # over the whole text, as in the run; Ollama looks at the last 64 tokens
        penalty = {"repeat_penalty": g.repetition_penalty, "repeat_last_n": -1} if g.repetition_penalty != 1.0 else {}
        parameters = sampling | penalty | {"num_predict": g.max_completion_length}
        write_ollama(written.evidence.work, written.evidence.file, folder, parameters, g.stop_strings)
        if g.min_new_tokens:
            message(
                f"Ollama knows no least length: generation.min_new_tokens={g.min_new_tokens} is not in the Modelfile"
            )
        return written

    def usage(self, folder: Path, name: str, base: str, spec: AlgorithmSpec | None) -> str:
        """Making the model, and running it."""
        return f"```\nollama create {name} -f Modelfile\nollama run {name}\n```"
