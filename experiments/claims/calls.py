"""What a method costs: the calls of its UNet, forward and backward, each of one image."""

from collections.abc import Iterator


class Calls:
    """Counts the passes through a UNet, from now on. A pass of B images counts B; guidance needs two.

    A backward pass counts as one, too, whatever gradient it takes. A pass that is computed again, to save
    memory, counts again.

    Args:
        unet: of diffusers; its latents are its first argument.
    """

    def __init__(self, unet):
        self.forward = 0
        self.backward = 0
        unet.register_forward_pre_hook(self.note_forward)
        unet.register_forward_hook(self.await_backward)

    @property
    def total(self) -> int:
        """All so far."""
        return self.forward + self.backward

    def note_forward(self, unet, args: tuple) -> None:
        """A pass begins."""
        self.forward += len(args[0])

    def await_backward(self, unet, args: tuple, output) -> None:
        """Count the backward pass of this one, where there will be one."""
        if output.sample.requires_grad:
            output.sample.register_hook(self.note_backward)

    def note_backward(self, gradient) -> None:
        """The gradient of a pass's output has come."""
        self.backward += len(gradient)

    def rounds(self, budget: float) -> Iterator[int]:
        """Rounds of work, from 0, until the budget is spent: the last one may go beyond it.

        Args:
            budget: calls, counted from the first round on; one round is always done. A round without calls is
                the last.
        """
        end = self.total + budget
        before = -1
        i = 0
        while i == 0 or before < self.total < end:
            before = self.total
            yield i
            i += 1
