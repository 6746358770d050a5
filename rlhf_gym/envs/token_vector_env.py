"""N conversations in one batch: one reference step and one reward-model call for all rows."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs.actor import Actor, ActorBinding
from rlhf_gym.envs.checked_actions import checked_actions, whole_responses
from rlhf_gym.envs.groups import PromptGroup
from rlhf_gym.envs.infos import EpisodeInfos
from rlhf_gym.envs.resets import checked_options, checked_seeds, named_prompts
from rlhf_gym.envs.traces import RENDER_FPS, Frame, RowTraces
from rlhf_gym.errors import InputError
from rlhf_gym.lm.masks import NEVER
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.functions import TextReward
from rlhf_gym.rewards.responses import Responses, observation_sequences
from rlhf_gym.tokens import PAD, append, join, pad_rows, row_lengths
from rlhf_gym.utils.arrays import Bools, Floats, Ints

RENDER_MODES = ("ansi", "rgb_array")


class TokenVectorEnv(VectorEnv[Ints, Ints, Any]):
    """A natively batched environment in which each row completes a prompt token by token.

    Args:
        objective: Reward, reference and β.
        prompts: The prompts that `reset` draws from, at random with replacement.
        num_envs: N, number of rows.
        max_new_tokens: T, the token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        rows_per_prompt: Each k consecutive rows play the same prompts in the same order, for group
            baselines (GRPO, RLOO); k must divide N.
        autoreset_mode: "SameStep", "NextStep" or "Disabled", as in Gymnasium.
        gold: A scorer that only evaluation uses, as (prompts, responses) -> scores.
        render_mode: "ansi" (text), "rgb_array" (images) or None.

    Raises:
        InputError: An argument is not one of these, or k does not divide N.
    """

    def __init__(
        self,
        objective: Objective,
        prompts: PromptDataset,
        *,
        num_envs: int = 1,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        rows_per_prompt: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        gold: TextReward | None = None,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1 or max_new_tokens < 1:
            raise InputError("num_envs and max_new_tokens must be at least 1")
        if render_mode not in (None, *RENDER_MODES):
            raise InputError(f"render_mode must be one of {RENDER_MODES}, not {render_mode!r}")
        self.objective = objective
        self.prompts = prompts
        self.num_envs = num_envs
        self.max_new_tokens = max_new_tokens
        self.stop_at_eos = stop_at_eos
        self.gold = gold
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {
            "render_modes": [*RENDER_MODES],
            "render_fps": RENDER_FPS,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = render_mode
        # Decoding costs time in every step, so only an environment that renders does it.
        rendered = render_mode is not None
        self.traces = RowTraces(objective.reference, num_envs) if rendered else None
        vocab_size = objective.reference.vocab_size
        width = prompts.max_tokens + max_new_tokens
        self.single_observation_space = spaces.Box(-1, vocab_size - 1, (width,), np.int64)
        self.single_action_space = spaces.Discrete(vocab_size)
        self._vocab_size = vocab_size
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._eos = np.array(objective.reference.eos_ids if stop_at_eos else [], dtype=np.int64)
        self._binding = ActorBinding()
        self._rngs = [np_random()[0] for _ in range(num_envs)]
        self.group_rows(rows_per_prompt)
        self._tokens: Ints = np.full((num_envs, width), PAD, dtype=np.int64)
        self._prompt_lengths: Ints = np.zeros(num_envs, dtype=np.int64)
        self._kl_sums: Floats = np.zeros(num_envs)
        self._along_sums: Floats = np.zeros(num_envs)  # token rewards so far
        self._over: Bools = np.ones(num_envs, dtype=np.bool_)  # rows that need a reset
        self.episodes = 0  # responses finished so far

    @property
    def actor(self) -> Actor | None:
        """The bound actor; None if nobody is bound or the actor no longer exists."""
        return self._binding.get()

    def bind_actor(self, actor: Actor | None, *, named: bool = True) -> None:
        """Ask `actor` for log π from now on (weak reference); None lets the agent pay its half.

        A `CausalLMPolicy` needs no call: it is bound by acting (`rlhf_gym.envs.actor`).

        Args:
            actor: The actor.
            named: Whether the user names it. An actor that was bound otherwise is replaced sooner.

        Raises:
            InputError: It is a copy that has not acted.
        """
        self._binding.bind(actor, named=named)

    def group_rows(self, rows_per_prompt: int) -> None:
        """Let each k consecutive rows play the same prompts, from the next `reset` of all rows.

        J does not depend on k, so an agent that compares responses may choose it.

        Raises:
            InputError: k does not divide the number of rows.
        """
        if rows_per_prompt < 1 or self.num_envs % rows_per_prompt:
            raise InputError(
                f"rows_per_prompt must divide num_envs = {self.num_envs}, not be {rows_per_prompt}"
            )
        self.rows_per_prompt = rows_per_prompt
        self._groups = [PromptGroup() for _ in range(self.num_envs // rows_per_prompt)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Ints, dict[str, Any]]:
        """Start with new prompts.

        Args:
            seed: Row i is seeded seed + i, or seed[i].
            options: `reset_mask` (N,) bool: which rows to reset. `prompt` (text or chat messages)
                or `prompt_index`: one prompt for all these rows, or a list with one for each.

        Returns:
            Observations (N, L), and infos with the keys of a step in which nothing is known yet.
        """
        options = checked_options(options, self.num_envs)
        mask: Bools = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), dtype=np.bool_)
        if seed is not None:
            seeds = checked_seeds(seed, self.num_envs)
            for i in np.flatnonzero(mask).tolist():
                # One generator per row, so that a row's prompts do not depend on its neighbours:
                # row i seeded s equals a single environment seeded s + i.
                if seeds[i] is not None:
                    self._rngs[i] = np_random(seeds[i])[0]
                    self._groups[i // self.rows_per_prompt] = PromptGroup()
        if mask.all():  # rows that start together play the same prompts again from here on
            self._groups = [PromptGroup() for _ in self._groups]
        named = named_prompts(options, int(mask.sum()), self.prompts, self.objective.reference)
        if named is None:
            self._begin(mask)
        else:
            self._place(mask, named)
        return self._observed(), self._new_infos().to_dict()

    def step(self, actions: Ints) -> tuple[Ints, Floats, Bools, Bools, dict[str, Any]]:
        """Append one token to each row.

        If the reward raises, the environment is unchanged and the same step may be tried again.

        Args:
            actions: (N,) token ids.

        Returns:
            Observations (N, L), rewards, terminations, truncations (always False), infos.
        """
        actions = checked_actions(actions, self.num_envs, self._vocab_size)
        waiting = self._over.copy()
        begun = self._prompt_lengths > 0
        if waiting.any() and (self.autoreset_mode != AutoresetMode.NEXT_STEP or not begun.all()):
            raise gymnasium.error.ResetNeeded(
                f"rows {np.flatnonzero(waiting).tolist()} have ended or never started; call reset"
            )
        going = ~waiting
        infos = self._new_infos()
        # `_tokens` is replaced and never changed in place, so a reference is enough to undo it.
        before = self._tokens, self._kl_sums.copy(), self._along_sums.copy()
        try:
            rewards, ended = self._take(actions, going, infos)
        except BaseException:
            self._tokens, self._kl_sums, self._along_sums = before
            raise
        self._over = ended.copy()
        if self.traces is not None:
            self.traces.add(actions, going, infos.to_dict())
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            infos.finalise(ended, self._tokens)
            self._begin(ended)
        elif waiting.any():
            # "NextStep": a row that ended before ignores this action and starts a new prompt.
            self._begin(waiting)
            self._over = ended.copy()
        return self._observed(), rewards, ended, np.zeros_like(ended), infos.to_dict()

    def _take(self, actions: Ints, going: Bools, infos: EpisodeInfos) -> tuple[Floats, Bools]:
        """Append one token to the rows that go on; return rewards (N,) and which rows ended."""
        rewards = self._penalties(actions, going, infos)
        tokens = self._tokens.copy()
        tokens[going] = append(tokens[going], actions[going])
        self._tokens = tokens
        # The budget terminates and never truncates: Stable-Baselines3 would add γ · V of the last
        # observation to the score of a truncated episode.
        ended = going & (np.isin(actions, self._eos) | (self._taken() >= self.max_new_tokens))
        if self.objective.token_rewards:
            rewards[going] += self._along(going, ended)
        if ended.any():
            rewards[ended] += self._finish(ended, infos)
        return rewards, ended

    def play(
        self, actions: Ints, log_probs: npt.NDArray[np.floating[Any]] | None = None
    ) -> tuple[Floats, dict[str, Any], Ints]:
        """Take one whole response per row from the current prompts; then draw new prompts.

        Pays exactly what `step` would pay token by token, with one pass of the reference and one of
        the reward model.

        Args:
            actions: (N, T) token ids, PAD after each response's end.
            log_probs: (N, T) log π of the actions; if None, the bound actor is asked.

        Returns:
            Rewards (N, T), infos (`ref_log_prob` and `kl` (N, T); `score`, `kl_sum`,
            `finish_reason`, `prompt`, `response`, `actor_bound` (N,)), the next prompts (N, L).

        Raises:
            InputError: A row is not exactly one whole response.
        """
        self._check_at_prompts()
        actions = whole_responses(
            actions, self.num_envs, self.max_new_tokens, self._vocab_size, self._eos
        )
        lengths = row_lengths(actions)
        tokens = join(self._tokens, actions)[:, : self._tokens.shape[1]]
        sequences = observation_sequences(tokens, self._prompt_lengths)
        sequences = sequences.to(self.objective.reference.device)
        flat = self._flat_log_probs(actions, log_probs)
        settled = self.objective.settle(
            sequences,
            None if flat is None else flat.to(sequences.tokens.device),
            stop_at_eos=self.stop_at_eos,
        )
        mask = np.arange(actions.shape[1]) < lengths[:, None]
        # A masked token has the logit `NEVER` and a log-prob about as low; no allowed token has.
        barred = np.full(actions.shape, False)
        barred[mask] = settled.ref_log_probs.cpu().numpy() < NEVER / 2
        if barred.any():
            row, column = np.argwhere(barred)[0]
            raise InputError(self._barred(int(row), actions[:, column]))
        infos = self._new_infos()
        everyone = np.ones(self.num_envs, dtype=np.bool_)
        kl_sums = infos.add_wave(settled, mask)
        scores = settled.scores.double().cpu().numpy()
        infos.add_episodes(settled.responses, scores, kl_sums, everyone)
        infos.add("actor_bound", np.full(self.num_envs, flat is not None), everyone)
        self.episodes += self.num_envs
        rewards = np.zeros(actions.shape)
        rewards[mask] = settled.rewards.double().cpu().numpy()
        self._begin(everyone)
        return rewards, infos.to_dict(), self._observed()

    def resized(self, num_envs: int) -> "TokenVectorEnv":
        """A new environment of the same task, with another number of rows."""
        return TokenVectorEnv(
            self.objective,
            self.prompts,
            num_envs=num_envs,
            max_new_tokens=self.max_new_tokens,
            stop_at_eos=self.stop_at_eos,
            gold=self.gold,
            render_mode=self.render_mode,
        )

    def at_prompts(self, observations: Ints) -> bool:
        """Whether every row is at the prompt that these observations (N, L) show."""
        return not self._midway.any() and np.array_equal(observations, self._tokens)

    def render(self) -> tuple[Frame, ...] | None:
        """The conversations so far; after an automatic reset, the new prompt.

        Returns:
            One frame per row: text ("ansi") or an image (360, 640, 3) uint8 ("rgb_array"). None
            without a render mode.
        """
        if self.traces is None:
            return None
        assert self.render_mode is not None
        return self.traces.frames(self.render_mode)

    def action_masks(self) -> Bools:
        """Which tokens each row may choose now, (N, V); not cached, so ask once per step."""
        if not (self._prompt_lengths > 0).all():
            raise gymnasium.error.ResetNeeded("no row has a prompt yet; call reset first")
        device = self.objective.reference.device
        allowed = self.objective.allowed_next(
            torch.from_numpy(self._tokens).to(device), torch.from_numpy(self._taken()).to(device)
        )
        masks: Bools = allowed.cpu().numpy()
        return masks

    def get_state(self) -> dict[str, Any]:
        """Everything that later episodes depend on, as JSON: prompts and each row's RNG.

        Raises:
            InputError: A row is in the middle of a response.
        """
        if self._midway.any():
            raise InputError(
                "the state can only be saved at prompts; a row is in the middle of a response"
            )
        return {
            "prompts": [row[row != PAD].tolist() for row in self._tokens],
            # A prompt that a reset named is not in the data set.
            "chats": [self.prompts.chats.get(tuple(row[row != PAD])) for row in self._tokens],
            "rngs": [rng.bit_generator.state for rng in self._rngs],
            "groups": [group.get_state() for group in self._groups],
            "episodes": self.episodes,
        }

    def set_state(self, state: dict[str, Any]) -> Ints:
        """Continue from `get_state`; returns the observations (N, L)."""
        if len(state["prompts"]) != self.num_envs:
            raise InputError(
                f"the state has {len(state['prompts'])} rows, this environment {self.num_envs}"
            )
        every = np.ones(self.num_envs, dtype=np.bool_)
        for rng, held in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = held
        self._groups = [PromptGroup.from_state(held) for held in state["groups"]]
        self.episodes = state["episodes"]
        rows = [tuple(row) for row in state["prompts"]]
        for row, chat in zip(rows, state.get("chats", []), strict=False):
            if chat is not None:
                self.prompts.chats.setdefault(row, chat)
        self._place(every, rows)
        return self._observed()

    def _observed(self) -> Ints:
        """The observations (N, L) that whoever acts next is going to see."""
        self._binding.observed()
        return self._tokens.copy()

    def _new_infos(self) -> EpisodeInfos:
        # With "SameStep" a text is only ever known in `final_info`.
        texts = self.autoreset_mode != AutoresetMode.SAME_STEP
        return EpisodeInfos(self.num_envs, ensemble=self.objective.members > 1, texts=texts)

    def _begin(self, mask: Bools) -> None:
        self._place(mask, [self._draw(i) for i in np.flatnonzero(mask).tolist()])

    def _draw(self, row: int) -> tuple[int, ...]:
        k = self.rows_per_prompt
        if k == 1:
            return self.prompts.draw(self._rngs[row])
        # The group draws with its first row's generator, whichever row is first to need a prompt.
        first = row - row % k
        return self._groups[row // k].next(row % k, k, lambda: self.prompts.draw(self._rngs[first]))

    def _place(self, mask: Bools, rows: list[tuple[int, ...]]) -> None:
        tokens = self._tokens.copy()
        tokens[mask] = pad_rows(rows, tokens.shape[1])
        self._tokens = tokens
        self._prompt_lengths[mask] = [len(row) for row in rows]
        self._kl_sums[mask], self._along_sums[mask] = 0.0, 0.0
        self._over[mask] = False
        if self.traces is not None:
            self.traces.start(mask, rows)

    def _penalties(self, actions: Ints, going: Bools, infos: EpisodeInfos) -> Floats:
        """The KL penalties of all rows that act, (N,); also put into infos."""
        device = self.objective.reference.device
        reference = self.objective.ref_log_prob_of_next(
            torch.from_numpy(self._tokens).to(device),
            torch.from_numpy(actions).to(device),
            torch.from_numpy(self._taken()).to(device),
        ).cpu()
        barred = going & (reference.numpy() < NEVER / 2)
        if barred.any():
            raise InputError(self._barred(int(np.flatnonzero(barred)[0]), actions))
        found = self._binding.log_probs(self._tokens, actions, going)
        log_probs, kl = None, np.full(self.num_envs, np.nan)  # not known
        if found is not None:
            log_probs = torch.from_numpy(found)
            kl = (log_probs - reference).double().numpy()
            infos.add("kl", kl, going)
        self._kl_sums += np.where(going, kl, 0.0)
        infos.add("ref_log_prob", reference.double().numpy(), going)
        infos.add("actor_bound", np.full(self.num_envs, found is not None), going)
        penalties = self.objective.penalties(reference, log_probs).double().numpy()
        return np.where(going, penalties, 0.0)

    def _taken(self) -> Ints:
        """Number of tokens that each response has already, (N,)."""
        return row_lengths(self._tokens) - self._prompt_lengths

    def _barred(self, row: int, tokens: Ints) -> str:
        return (
            f"row {row} chose token {int(tokens[row])} "
            f"({self.objective.reference.tokenizer.decode([int(tokens[row])])!r}), which the mask "
            "of this environment does not allow there; choose by `action_masks()`, or let a policy "
            "use the reference's mask (`CausalLM.following`)"
        )

    def _along(self, going: Bools, ended: Bools) -> Floats:
        """Token rewards of the tokens just taken, (rows that go on,)."""
        responses = self._responses(going, ended)
        last = torch.cumsum(responses.sequences.lengths, 0) - 1
        along = self.objective.rewards_along(responses)[last].double().cpu().numpy()
        self._along_sums[going] += along
        return along

    def _finish(self, ended: Bools, infos: EpisodeInfos) -> Floats:
        """The final scores of the rows that ended; also put into infos."""
        responses = self._responses(ended, ended)
        # Token rewards were paid along the way; `score` in infos adds both.
        final = self.objective.final_scores(responses).double().cpu().numpy()
        self.episodes += int(ended.sum())
        scores = final + self._along_sums[ended]
        infos.add_episodes(responses, scores, self._kl_sums[ended], ended)
        return final

    def _responses(self, rows: Bools, ended: Bools) -> Responses:
        """The responses so far of some rows."""
        sequences = observation_sequences(self._tokens[rows], self._prompt_lengths[rows])
        reference = self.objective.reference
        whole = torch.from_numpy(ended[rows]).to(reference.device)
        return Responses(
            reference,
            sequences.to(reference.device),
            whole,
            stop_at_eos=self.stop_at_eos,
            chats=self.objective.chats,
        )

    @property
    def _midway(self) -> Bools:
        """Which rows are not at a prompt, (N,): they are in a response, or wait for a reset."""
        return self._over | (row_lengths(self._tokens) > self._prompt_lengths)

    def _check_at_prompts(self) -> None:
        if self._midway.any():
            rows = np.flatnonzero(self._midway).tolist()
            raise InputError(f"rows {rows} are not at a prompt; reset them first")

    def _flat_log_probs(
        self, actions: Ints, log_probs: npt.NDArray[np.floating[Any]] | None
    ) -> torch.Tensor | None:
        mask = actions != PAD
        if log_probs is None:
            actor = self._binding.get()
            if actor is None:
                return None
            log_probs = np.zeros(actions.shape, dtype=np.float32)
            tokens = self._tokens
            for t in range(int(mask.sum(1).max())):
                now = np.where(mask[:, t], actions[:, t], 0)
                log_probs[:, t] = actor.log_prob(tokens, now)
                grown = append(tokens[mask[:, t]], now[mask[:, t]])
                tokens = tokens.copy()
                tokens[mask[:, t]] = grown
        log_probs = np.asarray(log_probs)
        if log_probs.shape != actions.shape:
            raise InputError(f"log_probs must be {actions.shape}, not {log_probs.shape}")
        return torch.from_numpy(log_probs[mask]).float()


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
    except ValueError as error:
        names = [m.value for m in AutoresetMode]
        raise InputError(f"autoreset_mode must be one of {names}, not {mode!r}") from error
