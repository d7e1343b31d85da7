// Which metrics stand in which panel. A panel has one unit and one axis; what nobody listed stands under "Other".

// kind: "share" is drawn in percent, "bytes" in GiB; "level" need not begin at zero.
const PANELS = [
  { group: "Reward", title: "Total reward", keys: { "reward/mean": "mean of a step" }, spread: "reward/std" },
  { group: "Reward", title: "Groups without a learning signal", keys: { "groups/without_signal": "share of the groups" }, kind: "share" },
  { group: "Reward", title: "PPO's objective, sum of a completion", kind: "level", keys: {
    "objective/scores": "reward", "objective/non_score_reward": "KL penalty", "objective/rlhf_reward": "reward less penalty" } },
  { group: "Reward", title: "Groups sampled", keys: { "groups/sampled": "sampled", "groups/set_aside": "set aside" } },
  { group: "Policy", title: "KL to the reference, nats a token", kind: "level", keys: { kl: "KL" } },
  { group: "Policy", title: "KL to the reference, nats a completion", kind: "level", keys: { "objective/kl": "KL" } },
  { group: "Policy", title: "KL coefficient", keys: { "objective/kl_coef": "coefficient" } },
  { group: "Policy", title: "Entropy, nats a token", keys: { entropy: "entropy" } },
  { group: "Policy", title: "Entropy coefficient", keys: { entropy_coef: "coefficient" } },
  { group: "Policy", title: "Loss", kind: "level", keys: {
    loss: "loss", policy_loss: "policy loss", "policy/loss": "policy loss", "eval/loss": "held-out loss" } },
  { group: "Policy", title: "Gradient norm", keys: { grad_norm: "policy", "grad_norm/critic": "critic" } },
  { group: "Policy", title: "Learning rate", keys: { learning_rate: "policy", "learning_rate/critic": "critic" } },
  { group: "Policy", title: "Clipped tokens", kind: "share", keys: {
    "policy/clip_fraction": "policy", "value/clip_fraction": "value", "clip_ratio/low": "at the lower bound",
    "clip_ratio/high": "at the upper bound", cispo_clip_ratio: "at the upper bound", "policy/left_out": "left out" } },
  { group: "Policy", title: "KL of an update, nats a token", kind: "level", keys: {
    "policy/approx_kl": "k1 estimate", "policy/approx_kl_k3": "k3 estimate", "policy/approx_kl_first": "before the first pass" } },
  { group: "Policy", title: "Probability ratio of an update", keys: {
    "policy/ratio_mean": "mean", "policy/ratio_min": "least", "policy/ratio_max": "greatest", "policy/ratio_std": "std" } },
  { group: "Policy", title: "Sampling against training, nats a token", keys: { "sampling/logp_difference": "difference of log-probs" } },
  { group: "Policy", title: "PPO epochs taken", keys: { "policy/epochs": "epochs" } },
  { group: "Policy", title: "Steps skipped by the loss scale", keys: { "loss_scale/skipped_steps": "steps" } },
  { group: "Value", title: "Explained variance", kind: "level", keys: { "value/explained_variance": "explained variance" } },
  { group: "Value", title: "Values and returns", kind: "level", keys: { "value/mean": "value", "value/returns_mean": "return" } },
  { group: "Value", title: "Value loss", keys: { "value/loss": "loss" } },
  { group: "Pairs", title: "Pairs in the right order", kind: "share", keys: {
    accuracy: "by score", "rewards/accuracies": "by reward", "logps/accuracy": "by log-prob", "eval/accuracy": "held-out" } },
  { group: "Pairs", title: "Scores", kind: "level", keys: { "score/margin": "margin", "score/mean": "mean" } },
  { group: "Pairs", title: "Implicit rewards", kind: "level", keys: {
    "rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin" } },
  { group: "Completions", title: "Completion length, tokens", keys: { "completion/mean_length": "mean" } },
  { group: "Completions", title: "Cut at the longest length", keys: { "completion/truncated": "share of the completions" }, kind: "share" },
  { group: "Completions", title: "The commonest completion", keys: { "completion/most_common": "share of the completions" }, kind: "share" },
  { group: "Completions", title: "Prompt length, tokens", keys: { "prompt/mean_length": "mean" } },
  { group: "Time and memory", title: "Time of a step, seconds", keys: {
    "time/step": "whole step", "time/rollout": "rollout", "time/score": "score", "time/update": "update" } },
  { group: "Time and memory", title: "Peak memory, GiB", keys: { "memory/peak_bytes": "peak of a step" }, kind: "bytes" },
  { group: "Time and memory", title: "Tokens a second", keys: {
    "derived/generated_rate": "generated", "derived/trained_rate": "trained" } },
  { group: "Time and memory", title: "Tokens of a step", keys: {
    "tokens/generated": "generated", "tokens/trained": "trained", "tokens/learned": "learned", "tokens/discarded": "discarded" } },
  { group: "Time and memory", title: "Retries after memory ran out", keys: { "memory/retries": "retries" } },
  { group: "Time and memory", title: "GPU utilization", keys: { "gpu/utilization": "of the time, percent" } },
  { group: "Time and memory", title: "GPU temperature, °C", keys: { "gpu/temperature": "temperature" } },
];
const GROUPS = ["Reward", "Held-out", "Tasks", "Policy", "Value", "Pairs", "Completions", "Time and memory", "Other"];
const HELD_OUT = "held-out/"; // of the measures of evaluations while a run went on
const EACH_REWARD = /^reward\/(?!(?:mean|std)$)([^/]+)$/;
const OF_TASK = /^task\/(.+?)\/((?:reward|completion|prompt|groups|tokens)\/.+|prompts)$/;
const RATES = [["derived/generated_rate", "tokens/generated", "time/rollout"], ["derived/trained_rate", "tokens/trained", "time/update"]];

/** Add what follows from two columns: tokens a second of a phase. */
function withRates(columns) {
  const found = { ...columns };
  for (const [name, tokens, seconds] of RATES) {
    if (!columns[tokens] || !columns[seconds]) continue;
    found[name] = columns[tokens].map((n, i) => (isNumber(n) && columns[seconds][i] > 0 ? n / columns[seconds][i] : null));
  }
  return found;
}

/** Return the panels of the metrics that were recorded, each with its `series` as [metric, label], in reading order. */
function panelsOf(names) {
  const left = new Set(names), panels = [];
  const take = (spec, series) => {
    if (!series.length) return;
    series.forEach(([name]) => left.delete(name));
    panels.push({ ...spec, series });
  };
  for (const spec of PANELS) {
    take(spec, Object.entries(spec.keys).filter(([name]) => left.has(name)));
    left.delete(spec.spread);
    if (spec.title === "Total reward") {
      const each = [...left].filter((name) => EACH_REWARD.test(name));
      take({ group: "Reward", title: "Each reward", kind: "level" }, each.map((name) => [name, name.match(EACH_REWARD)[1]]));
    }
  }
  for (const name of [...left].filter((one) => one.startsWith(HELD_OUT))) {
    const measure = name.slice(HELD_OUT.length);
    take({ group: "Held-out", title: `Held-out ${inWords(measure)}`, kind: isShare(measure) ? "share" : "level" }, [[name, "95% interval shaded"]]);
  }
  taskPanels(left, take);
  for (const [title, names] of grouped(left)) {
    take({ group: "Other", title, kind: "level" }, names.map((name) => [name, name.split("/").pop()]));
  }
  return panels.sort((a, b) => GROUPS.indexOf(a.group) - GROUPS.indexOf(b.group));
}

/** One panel for each quantity that tasks have, a line for each task. */
function taskPanels(left, take) {
  const found = new Map();
  for (const name of left) {
    const [, task, quantity] = name.match(OF_TASK) || [];
    if (task) found.set(quantity, [...(found.get(quantity) || []), [name, task]]);
  }
  for (const [quantity, series] of found) {
    const known = PANELS.find((spec) => Object.hasOwn(spec.keys, quantity));
    const title = known ? known.title : quantity.match(EACH_REWARD)?.[1] ?? quantity;
    if (quantity === "reward/std") series.forEach(([name]) => left.delete(name));
    else take({ group: "Tasks", title: `${title}, by task`, kind: known?.kind || "level" }, series);
  }
}

/** Group the metrics nobody listed: the least, mean and greatest of one quantity share a panel. */
function grouped(left) {
  const found = new Map();
  for (const name of [...left].sort()) {
    const [, stem] = name.match(/^(.+)\/(?:min|mean|max)$/) || [null, name];
    found.set(stem, [...(found.get(stem) || []), name]);
  }
  return found;
}
