// What only `watch` has: the list of runs, the graphics card, and a conversation with a finished run.

/** Draw the runs: a box each that puts its curves beside the others', and a button that opens it. */
function drawRuns(host, runs, { opened, overlaid, onOpen, onOverlay }) {
  const focused = host.contains(document.activeElement) && document.activeElement.dataset.key;
  const rows = runs.map((run) => {
    const gone = run.state === "gone";
    const box = el("input", { type: "checkbox", checked: overlaid.includes(run.id), disabled: gone, "data-key": `box ${run.id}`, "aria-label": `Show the curves of ${run.name}, ${run.path}`, onchange: () => onOverlay(run.id, box.checked) });
    const progress = gone ? run.error : run.max_steps ? `step ${formatNumber(run.step)} of ${formatNumber(run.max_steps)}` : `step ${formatNumber(run.step)}`;
    const text = run.headline?.text ? `${run.headline.title} ${run.headline.text}` : "";
    return el("li", {}, box,
      el(`button.run${run.id === opened ? ".current" : ""}`, { type: "button", disabled: gone, "data-key": `open ${run.id}`, "aria-current": run.id === opened && "true", onclick: () => onOpen(run.id) },
        el("b", {}, run.name), el("span.muted.path", {}, run.path), el(`span.state.${STATES[run.state] ?? "unknown"}`, {}, String(run.state)),
        el("span.muted", {}, [run.algorithm, progress, text].filter(Boolean).join(" · "))));
  });
  fill(host, rows.length ? el("ul.runs", {}, rows) : el("p.muted", {}, "There is no run yet. This page shows one as soon as it begins."));
  if (focused) [...host.querySelectorAll("[data-key]")].find((node) => node.dataset.key === focused)?.focus();
}

/** Draw what the graphics cards do now. */
function drawGpu(host, told) {
  const cards = told.now ?? [];
  fill(host, cards.length ? cards.map((one) => el("div.gpu", {},
    el("b", {}, one.name ?? "graphics card"),
    isNumber(one.utilization) && barRow("in use", `${formatNumber(one.utilization)}%`, bar([[one.utilization, "taken", `${one.utilization}%`]], [], 100, `in use ${one.utilization}%`)),
    isNumber(one.used_bytes) && isNumber(one.total_bytes) && barRow("memory", `${formatBytes(one.used_bytes)} of ${formatBytes(one.total_bytes)}`,
      bar([[one.used_bytes, "planned", formatBytes(one.used_bytes)]], [], one.total_bytes, `${formatBytes(one.used_bytes)} of ${formatBytes(one.total_bytes)}`)),
    isNumber(one.temperature) && el("span.muted", {}, `${formatNumber(one.temperature)} °C`),
  )) : el("p.muted", {}, "No NVIDIA card tells its use on this machine."));
}

/** A conversation with a finished run: what the policy answers, and the reference beside it. */
class Chat {
  constructor(host, source) {
    this.source = source;
    this.input = el("textarea", { rows: 3, name: "prompt", required: true, maxlength: 20000, placeholder: "What a user would type" });
    this.send = el("button", { type: "submit" }, "Answer");
    this.said = el("p.muted", { role: "status" });
    this.answers = el("div.answers");
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.form = el("form.chat", { onsubmit: (event) => { event.preventDefault(); this.ask(); } }, labelled("Prompt", this.input, ".grow"), this.task = el("div"), this.send);
    fill(host, el("p.muted", {}, "The answers of the trained policy and of its reference, the model before training, at temperature 0. The first one loads the model. Ctrl+Enter sends."), this.form, this.said, this.answers);
  }

  open(id, run) {
    this.id = id;
    fill(this.task, (run.tasks ?? []).length > 1 && labelled("Task", select(run.tasks.map((name) => [name, name]), { name: "task" })));
    fill(this.answers);
    this.said.textContent = "";
  }

  async ask() {
    const prompt = this.input.value, id = this.id;
    this.send.disabled = true;
    this.said.textContent = "Answering.";
    try {
      const told = await this.source.chat(id, prompt, this.form.elements.task?.value);
      if (id !== this.id) return;
      this.said.textContent = "";
      const side = (name, text) => el("div.side", {}, el("h3", {}, name), el("pre", { tabindex: 0 }, textOf(text)));
      this.answers.prepend(el("article.sample", {}, el("div.message", {}, el("span.role", {}, "prompt"), el("pre", { tabindex: 0 }, prompt)),
        el("div.sides", {}, side("Policy", told.policy), side("Reference", told.reference))));
      this.input.value = "";
    } catch (error) {
      if (id === this.id) this.said.textContent = error.message;
    } finally {
      this.send.disabled = false;
    }
  }
}
