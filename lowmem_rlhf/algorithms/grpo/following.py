"""When the reference follows the policy: TRL's `SyncRefModelCallback`, which acts on every so many optimizer steps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.engine.following import mix_into_reference
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


class Follower:
    """Lets the reference follow the policy after the optimizer steps whose number `ref_model_sync_steps` divides.

    As TRL's does, it counts a step that was left out, and takes effect with the next rollout: the log-probs of the
    reference are those of the rollout's beginning in all iterations on it.

    Attributes:
        metrics: ``ref_model/lost`` of a step in which the reference moved, see `mix_into_reference`; else none.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.grpo
        self.mixed = int(bool(recipe.adapter))  # adapters that the reference holds: at first the one gone on from
        self.metrics: dict[str, float] = {}

    def of_step(self, trainer: "Trainer", progress: Progress) -> Callable[[int], None]:
        """Return what is to be told after each optimizer step of a step how many of these there were."""
        settings, self.metrics = self.settings, {}
        before = trainer.step * settings.num_iterations
        whole = trainer.recipe.training.max_steps * settings.num_iterations
        if not before and whole < settings.ref_model_sync_steps:
            progress.message(
                f"grpo.ref_model_sync_steps={settings.ref_model_sync_steps} is more than the run's {whole} optimizer "
                "steps: the reference never moves; lower it, or leave grpo.sync_ref_model out"
            )

        def stepped(taken: int) -> None:
            if (before + taken) % settings.ref_model_sync_steps == 0:
                self._follow(trainer)

        return stepped

    def _follow(self, trainer: "Trainer") -> None:
        trainer.optimizer.check_weights()
        alpha = self.settings.ref_model_mixup_alpha
        lost = mix_into_reference(trainer.base, alpha, self.mixed)
        self.mixed = 1 if alpha == 1 else self.mixed + 1
        self.metrics = {"ref_model/lost": max(lost, self.metrics.get("ref_model/lost", 0.0))}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the reference's adapter."""
        return {"mixed": self.mixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.mixed = int(state["mixed"])
