// The samples: search, filters, order, and the completions of one prompt beside each other.

const PAGE = 20;
const ORDERS = [["newest", "newest first"], ["oldest", "oldest first"], ["highest", "highest reward"], ["lowest", "lowest reward"], ["longest", "longest"], ["shortest", "shortest"]];

class Samples {
  constructor(host, source) {
    this.host = host;
    this.source = source;
    this.shown = 0;
    this.asked = 0;
    this.dialog = new Comparison(source);
  }

  /** Begin with another run. */
  open(id, run) {
    this.id = id;
    this.names = JSON.stringify([run.rewards, run.tasks]);
    const bounds = (text, low, high, more) => el("fieldset.control", {}, el("legend", {}, `${text}, from and to`), el("div.bounds", {},
      [[low, "from"], [high, "to"]].map(([name, end]) => el("input", { type: "number", name, "aria-label": `${text} ${end}`, autocomplete: "off", ...more }))));
    this.form = el("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() },
      labelled("Search", el("input", { type: "search", name: "text", placeholder: "text of a prompt or completion", autocomplete: "off" }), ".grow"),
      labelled("Order", select(ORDERS, { name: "sort" })),
      (run.rewards ?? []).length > 1 && labelled("Reward", select([["", "sum"], ...run.rewards.map((name) => [name, name])], { name: "reward" })),
      (run.tasks ?? []).length > 0 && labelled("Task", select([["", "all"], ...run.tasks.map((name) => [name, name])], { name: "task" })),
      bounds("Reward", "low", "high", { step: "any" }), bounds("Step", "first", "last", { step: 1, min: 0 }),
      labelled("Ended", select([["", "all"], ["false", "by itself"], ["true", "cut"]], { name: "truncated" })),
      el("button", { type: "reset" }, "Clear"),
    );
    const ask = paused(() => this.ask(false), 200);
    this.form.addEventListener("input", ask);
    this.form.addEventListener("reset", ask);
    this.count = el("p.muted", { role: "status" });
    this.list = el("div.samples");
    this.newer = el("button", { type: "button", hidden: true, onclick: () => this.ask(false) }, "Show newer samples");
    this.more = el("button", { type: "button", hidden: true, onclick: () => this.ask(true) }, "Show more");
    fill(this.host, this.form, this.count, this.newer, this.list, this.more);
    return this.ask(false);
  }

  /** Ask again what is asked for now, as the run has grown; while someone reads them, offer it. */
  refresh(run) {
    const { top, bottom } = this.list.getBoundingClientRect(), read = top < 0 && bottom > 0;
    this.newer.hidden = !(read || this.shown > PAGE || this.host.contains(document.activeElement));
    if (!this.newer.hidden) return undefined;
    return this.names === JSON.stringify([run.rewards, run.tasks]) ? this.ask(false) : this.open(this.id, run);
  }

  query() {
    const values = Object.fromEntries(new FormData(this.form)), found = { sort: values.sort };
    for (const name of ["text", "reward", "task"]) if (values[name]) found[name] = values[name];
    for (const name of ["low", "high", "first", "last"]) if (values[name] && isNumber(Number(values[name]))) found[name] = Number(values[name]);
    if (values.truncated) found.truncated = values.truncated === "true";
    return found;
  }

  async ask(more) {
    const turn = ++this.asked, offset = more ? this.shown : 0;
    let told;
    try {
      told = await this.source.samples(this.id, { ...this.query(), offset, limit: PAGE });
    } catch (error) {
      this.count.textContent = error.message;
      return;
    }
    if (turn !== this.asked) return; // a later question was answered first
    this.form.hidden = !told.all;
    const cards = told.rows.map((row) => this.card(row));
    if (more) this.list.append(...cards);
    else fill(this.list, cards);
    this.newer.hidden ||= !more;
    this.shown = offset + told.rows.length;
    this.more.hidden = this.shown >= told.total || !told.rows.length;
    const left = told.left_out ? `; ${told.left_out.toLocaleString("en-US")} more between the first and the last ones are in samples.jsonl` : "";
    this.count.textContent = told.all ? `${told.total.toLocaleString("en-US")} of ${counted(told.all, "sample")}${left}` : "No sample has been logged.";
    if (more) cards[0]?.focus();
  }

  card(row) {
    return el("article.sample", { tabindex: -1 },
      el("header", {}, el("b", {}, `step ${row.step ?? "?"}`), row.task && el("span.tag", {}, row.task), rewardTags(row), factsOf(row)),
      el("div.message", {}, el("span.role", {}, "prompt"), promptOf(row.prompt)),
      el("div.message", {}, el("span.role", {}, "completion"), el("pre", { tabindex: 0 }, textOf(row.completion))),
      el("button.quiet", { type: "button", onclick: (event) => this.dialog.open(this.id, row, event.target) }, "Compare with others of this prompt"),
    );
  }
}

/** Return what a sample was given, each reward, and their sum where they are several; other tasks' rewards are not its. */
function rewardTags(row) {
  const rewards = Object.entries(row.rewards ?? {}).filter(([, value]) => isNumber(value) || !row.task), several = rewards.length > 1 && isNumber(row.reward);
  return [
    ...(several ? [el("span.tag.sum", {}, `sum ${formatNumber(row.reward)}`)] : []),
    ...rewards.map(([name, value]) => el("span.tag", {}, `${name} ${formatNumber(value)}`)),
  ];
}

function factsOf(row) {
  const facts = [];
  if (isNumber(row.advantage)) facts.push(`advantage ${formatNumber(row.advantage)}`);
  if (isNumber(row.tokens)) facts.push(counted(row.tokens, "token"));
  if (row.truncated) facts.push("cut at the longest length");
  for (const [name, value] of Object.entries(row.more ?? {})) facts.push(`${name}: ${textOf(value)}`);
  return facts.map((fact) => el("span.muted.fact", {}, fact));
}

/** Return a prompt: a text, or the messages of a conversation with their roles. */
function promptOf(prompt) {
  if (!isConversation(prompt)) return el("pre", { tabindex: 0 }, textOf(prompt));
  if (prompt.length === 1) return el("pre", { tabindex: 0 }, textOf(prompt[0].content));
  return el("div.turns", {}, prompt.map((turn) => el("div", {}, el("span.role.turn", {}, String(turn.role ?? "")), el("pre", { tabindex: 0 }, textOf(turn.content)))));
}

/** A dialog: two completions of one prompt, and the words in which they differ. */
class Comparison {
  constructor(source) {
    this.source = source;
    this.body = el("div.comparison");
    this.dialog = el("dialog", { "aria-label": "Completions of one prompt" },
      el("form", { method: "dialog" }, el("h2", {}, "Completions of one prompt"), el("button", {}, "Close")), this.body);
    document.body.append(this.dialog);
    this.dialog.addEventListener("close", () => this.from?.isConnected && this.from.focus());
  }

  async open(id, row, from) {
    this.from = from;
    this.words = true;
    fill(this.body, el("p.muted", {}, "Looking for them."));
    this.dialog.showModal();
    try {
      const told = await this.source.samePrompt(id, row.index);
      this.show(row, told.rows, told.total ?? told.rows.length);
    } catch (error) {
      fill(this.body, el("p", { role: "alert" }, error.message));
    }
  }

  show(row, rows, total) {
    const texts = rows.map((one) => ({ name: `step ${one.step}, sample ${one.index}`, row: one, text: textOf(one.completion) }));
    for (const [name, value] of Object.entries(row.more ?? {})) {
      if (/^(reference|answer|expected|solution|target)/i.test(name)) texts.push({ name: `${name} of this row`, text: textOf(value) });
    }
    const here = texts.findIndex((one) => one.row?.index === row.index), last = rows.length - 1;
    const sides = [0, here > 0 ? here : texts.length > 1 ? Math.max(last, 1) : 0];
    const about = total > 1 ? `${counted(total, "sample")} of this prompt${total > rows.length ? `, of which ${rows.length} are here` : ""}` : "This prompt was sampled once; there is no other completion to compare with.";
    const columns = ["Before", "After"].map((title, side) => {
      const choice = select(texts.map((one, i) => [i, one.name, i === sides[side]]), { onchange: () => { sides[side] = Number(choice.value); draw(); } });
      const text = el("pre", { tabindex: 0 }), tags = el("div.tags");
      return { node: el("div.side", {}, labelled(title, choice), tags, text), text, tags };
    });
    const draw = () => {
      const [before, after] = sides.map((side) => texts[side]);
      const pieces = this.words && before !== after ? differences(before.text, after.text) : null;
      columns.forEach((column, side) => {
        const one = [before, after][side];
        fill(column.text, pieces ? marked(pieces, side ? "new" : "gone") : one.text);
        fill(column.tags, one.row ? [rewardTags(one.row), factsOf(one.row)] .flat() : []);
      });
    };
    const mark = el("input", { type: "checkbox", checked: this.words, onchange: () => { this.words = mark.checked; draw(); } });
    fill(this.body, el("p.muted", {}, about), promptOf(row.prompt), el("label.control.inline", {}, mark, el("span", {}, "Mark the words that differ")),
      el("div.sides", {}, columns.map((column) => column.node)));
    draw();
  }
}
