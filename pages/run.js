// The page of a training run: its table of sampled responses.

function strip(group, reward) { // all rewards of the group, and where this response's is
  const all = group.rewards, low = Math.min(...all), high = Math.max(...all);
  if (low === high) return el("p", { class: "strip" }, `all ${all.length} rewards of the group are ${fixed(low)}`);
  const x = (value) => 4 + 192 * (value - low) / (high - low);
  const tick = (value, name) => svg("line", { class: name, x1: x(value), x2: x(value), y1: 2, y2: 14 });
  return el("p", { class: "strip" }, `the group's ${all.length} rewards: ${fixed(low)} `,
    svg("svg", { viewBox: "0 0 200 16", width: 200, height: 16, "aria-hidden": "true" },
      all.map((value) => tick(value, "any")), tick(reward, "this")), ` ${fixed(high)}`);
}

function runPage() {
  const rows = data.groups.flatMap((group) => group.responses.map((one) => ({ ...one, group })));
  rows.forEach((row, place) => { row.place = place; });
  const columns = [
    { name: "query", title: "Query", value: (row) => row.group.query, show: (row) => short(row.group.query) },
    { name: "step", title: "Step", number: true, value: (row) => row.group.step,
      show: (row) => String(row.group.step) },
    { name: "group", title: "Group", value: (row) => row.group.chosen, show: (row) => row.group.chosen },
    { name: "reward", title: "Reward", number: true, value: (row) => row.reward,
      show: (row) => fixed(row.reward) },
    { name: "advantage", title: "Advantage", number: true, value: (row) => row.advantage,
      show: (row) => signed(row.advantage, 2) },
    { name: "length", title: "Tokens", number: true, value: (row) => row.tokens,
      show: (row) => String(row.tokens) },
    { name: "flags", title: "", value: (row) => Number(row.malformed) + Number(row.cut_off), show: flags },
  ];
  if (data.runs.length > 1) {
    columns.splice(1, 0, { name: "run", title: "Run", value: (row) => row.group.run, show: (row) =>
      [el("i", { class: `swatch run${row.group.run}` }), data.runs[row.group.run]] });
  }
  const words = (row) => [row.group.qid, row.group.query, row.response,
    ...row.group.passages.flatMap((passage) => [passage.docid, passage.text])].join("\n");
  const open = (row, tr) => {
    const was = find("tr.detail"), same = was && was.previousSibling === tr;
    if (was) was.remove();
    if (same) return;
    tr.after(el("tr", { class: "detail" }, el("td", { colspan: columns.length },
      el("p", { class: "note" }, `query ${row.group.qid}, step ${row.group.step}`),
      el("p", { class: "whole" }, row.group.query),
      strip(row.group, row.reward),
      windowView(row.group.passages, row.malformed ? null : row.order, row.response))));
    tr.scrollIntoView({ block: "nearest" });
  };
  table(columns, rows, ["step", true], words, open);
}

runPage();
performance.mark("shown");
