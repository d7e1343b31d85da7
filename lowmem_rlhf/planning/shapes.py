"""What passes over a recipe's data hold at most, in tokens: pure arithmetic, without torch.

Letters: P prompt tokens, L completion tokens, G completions a prompt, C = L - 1 completion tokens that are fed (the
last one predicts nothing that is scored).
"""

from dataclasses import astuple, dataclass

from lowmem_rlhf.planning.limits import ATTENDED_PER_TOKEN
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER


@dataclass(frozen=True)
class PackedShape:
    """A packed row: each prompt once, its completions behind it.

    Attributes:
        tokens: fed, T.
        prompt_tokens: those of them that are prompts'.
        attended: key positions of the completions, P + C each.
        scored: positions whose log-prob or value is asked for, S.
        prompt_scores, own_scores: pairs of a query and a key in the attention of prompts and of completions.
        prompt_keys, own_keys: keys of one query at most.
        row_scores: pairs of the longest completion.
    """

    tokens: int
    prompt_tokens: int
    attended: int
    scored: int
    prompt_scores: int
    own_scores: int
    prompt_keys: int
    own_keys: int
    row_scores: int

    @property
    def rows(self) -> float:
        """Completions in it, or texts where it has no completions."""
        return self.attended / self.own_keys if self.own_keys else self.tokens / self.prompt_keys

    @property
    def own_tokens(self) -> int:
        """Fed tokens that are completions'."""
        return self.tokens - self.prompt_tokens


def packed_shape(prompt: int, fed: int, scored: int, generations: int, groups: int, tokens: int) -> PackedShape:
    """Return the largest packed row of at most ``tokens`` where every prompt and completion has its full length.

    The packer puts whole groups into a row, or the part of one that fits; a row that such pieces do not fill is taken
    to be filled with more of the same, as shorter completions could fill it.

    Args:
        prompt, fed, scored: tokens of a prompt, and of each completion those fed and those scored.
        generations, groups: completions a prompt, and prompts in the whole batch.
        tokens: of the micro-batch; one prompt with one completion is always taken.
    """
    per = min(generations, max(1, (tokens - prompt) // max(fed, 1)))
    while per > 1 and prompt + per * (prompt + fed) > ATTENDED_PER_TOKEN * tokens:
        per -= 1
    room = min(max(tokens, prompt + fed), groups * (prompt + generations * fed))

    def of_pieces(size: int) -> PackedShape:
        """Return a row of pieces with so many completions each."""
        fits = ATTENDED_PER_TOKEN * tokens / (prompt + size * (prompt + fed))
        pieces = max(1.0, min(room / (prompt + size * fed), fits))
        counts = (prompt + size * fed, prompt, size * (prompt + fed), size * scored, prompt * prompt)
        packed = [round(pieces * count) for count in (*counts, size * fed * (prompt + fed))]
        return PackedShape(*[*packed, prompt, prompt + fed, fed * (prompt + fed)])

    whole, rest = of_pieces(per), generations % per
    if not rest or whole.tokens >= room:
        return whole
    # keys bound a row of whole pieces; one of what is left of the groups may be longer
    left = of_pieces(rest)
    share = min(1.0, groups * (prompt + rest * fed) / left.tokens)
    return PackedShape(*(max(a, round(share * b)) for a, b in zip(astuple(whole), astuple(left), strict=True)))


def prompts_shape(prompt: int, tokens: int) -> PackedShape:
    """Return the shape of a prefill pass: ``tokens`` of prompts of this length, nothing else."""
    return PackedShape(tokens, tokens, 0, 0, prompt * tokens, 0, prompt, 0, 0)


def step_shape(recipe: Recipe, tokens: int) -> PackedShape:
    """Return the largest row of a recipe's passes for scoring and updating with micro-batches of so many tokens."""
    groups = recipe.training.prompts_per_step
    if recipe.spec.rows in ("completions", "answers"):  # all of an example is learned but its first token
        length = row_tokens(recipe)
        return packed_shape(1, length - 2, length - 1, 1, groups, tokens)
    if recipe.spec.rows == "pairs":  # read to the last tokens; half of an example is taken to be the prompt
        half = row_tokens(recipe) // 2
        return packed_shape(half, half, half + 1, 2, groups, tokens)
    lengths, prompt = recipe.generation, recipe.data.max_prompt_length
    length = lengths.max_completion_length
    further = recipe.spec.bootstrap(recipe)
    return packed_shape(prompt, length - 1 + further, length + further, lengths.num_generations, groups, tokens)


def step_tokens(recipe: Recipe) -> int:
    """Packed tokens of a whole step at full length: each prompt once, all its completions."""
    return recipe.training.prompts_per_step * group_tokens(recipe)


def group_tokens(recipe: Recipe) -> int:
    """Packed tokens of one group at full length: a prompt with its completions, an example, or a pair."""
    if not recipe.spec.samples:
        return row_tokens(recipe) * recipe.spec.completions(recipe)
    lengths = recipe.generation
    return recipe.data.max_prompt_length + lengths.num_generations * lengths.max_completion_length


def row_tokens(recipe: Recipe) -> int:
    """Tokens of the longest prompt with one completion: the least a micro-batch must hold."""
    return sum(length_keys(recipe).values())


def length_keys(recipe: Recipe) -> dict[str, int]:
    """Return the recipe's keys that bound a row's tokens, with their values."""
    return recipe.spec.lengths(recipe)


def samples_completions(recipe: Recipe) -> bool:
    """Whether the run writes completions: to learn from, or to judge held-out ones by the recipe's rewards."""
    judges = recipe.spec.rewards == "optional" and bool(recipe.rewards and recipe.data.eval_size)
    return recipe.spec.samples or judges


def adapters_of(recipe: Recipe) -> tuple[int, int]:
    """Return how many adapters train (policy, critic) and how many are frozen (start, reward models).

    Each is taken to be of the policy's shape.
    """
    trained = 2 if recipe.spec.critic(recipe) in ("adapter", "reward") else 1
    return trained, starts_from_adapter(recipe) + sum(reward.function == REWARD_ADAPTER for reward in recipe.rewards)


def starts_from_adapter(recipe: Recipe) -> bool:
    """Whether the frozen adapter that the run goes on from is the reference."""
    return bool(recipe.adapter) and recipe.spec.reference == "below" and not recipe.spec.follows(recipe)


def reference_adapters(recipe: Recipe) -> int:
    """Return how many adapters of the policy's rank the reference computes with, or one of as many times the rank."""
    follows = recipe.spec.follows(recipe)
    return follows.rank if follows else int(starts_from_adapter(recipe))


def prompts_at_once(recipe: Recipe, rows: int) -> int:
    """Prompts in the cache while ``rows`` completions are written, in training or in evaluation.

    Evaluation writes ``num_samples`` completions a prompt, so its rows may each have a prompt of their own.
    """
    training = min(rows // recipe.generation.num_generations, recipe.training.prompts_per_step)
    training = training if recipe.spec.samples else 0
    evaluation = min(rows // recipe.evaluation.num_samples, recipe.data.eval_size)
    return max(training, evaluation, 1)  # a wave is of whole groups, or of a part of one


def rollout_rows(recipe: Recipe, rollout_batch_size: int) -> int:
    """Completions at once: no more than a step, or the evaluation, has."""
    return min(rollout_batch_size, all_rows(recipe))


def all_rows(recipe: Recipe) -> int:
    """Completions of a step, or of the evaluation where that has more."""
    step = recipe.training.prompts_per_step * recipe.generation.num_generations if recipe.spec.samples else 0
    return max(step, recipe.data.eval_size * recipe.evaluation.num_samples)
