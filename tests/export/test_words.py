"""What an export says first, from its facts."""

import pytest

from lowmem_rlhf.display.export import show_result
from lowmem_rlhf.export.proof.words import in_words

WHOLE = "Nothing of what was learned is lost."
ORIGINAL = " It stands on the original weights and not on the quantized ones that the run trained on"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"proof": {"kept_in_predictions": 1.003}}, WHOLE),
        ({"proof": {"kept_in_predictions": 0.99}, "dtype": "float16"}, WHOLE),
        (
            {"proof": {"kept_in_predictions": 0.66}, "dtype": "bfloat16"},
            "A third of what was learned is lost, as its numbers are stored in bfloat16.",
        ),
        (
            {"proof": {"kept_in_predictions": 1.0, "gguf_kept_in_predictions": 0.88}, "quantize": "q4_k_m"},
            "12% of what was learned is lost, as its numbers are stored in q4_k_m.",
        ),
        ({"proof": {"kept_in_predictions": "not measured"}}, "How much of what was learned is lost could not be"),
        ({"proof": {"judged": [{"largest_score_difference": 0.0}]}}, "Nothing of what was learned is lost: it gives"),
        (
            {
                "proof": {"gguf_kept_in_predictions": 0.99, "gguf_top1_agreement": 0.66},
                "onto": "original",
                "base_quantization": "nf4",
            },
            f"{WHOLE}{ORIGINAL}, so its answers are not word for word those of the live policy; the likeliest next "
            "word is the same in 66% of all places.",
        ),
        ({"proof": {"kept_in_predictions": 1.0}, "onto": "original", "base_quantization": "none"}, WHOLE),
    ],
)
def test_an_export_leads_with_how_much_is_lost(facts, words, capsys):
    assert in_words(facts).startswith(words)
    show_result({"dtype_reason": "", **facts, "summary": in_words(facts), "folder": "there"})
    assert capsys.readouterr().out.startswith(words[:60])
