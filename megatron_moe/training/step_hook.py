"""The interface of what a run does around its steps; see `hooks`."""

from __future__ import annotations


class Hook:
    """Called around steps and evaluations, on every rank; does nothing unless overridden."""

    def start(self) -> None:
        """Before the first step."""

    def before_step(self, completed: int) -> None:
        """After ``completed`` steps, before the next one."""

    def after_step(self, iteration: int) -> None:
        """After step ``iteration``, from 1."""

    def before_evaluation(self) -> None:
        """Before an evaluation."""

    def after_evaluation(self) -> None:
        """After an evaluation."""

    def close(self) -> None:
        """At the end, also after an exception."""
