// The page of a comparison: its table of queries. A row opens to what each system gained.

function comparisonPage() {
  const there = (row) => row.values.filter((value) => value !== null);
  const spread = (row) => Math.max(...there(row)) - Math.min(...there(row));
  const figure = (value) => (value === null ? "\u2013" : fixed(value, 1));
  const columns = [
    { name: "query", title: "Query", value: (row) => row.query || row.qid,
      show: (row) => short(row.query || row.qid) },
    { name: "dataset", title: "Dataset", value: (row) => row.dataset, show: (row) => row.dataset },
    ...data.names.map((name, i) => ({ name: `system${i}`, title: i ? name.split(" ")[0] : name, number: true,
      value: (row) => row.values[i] ?? -1, show: (row) => figure(row.values[i]) })),
    { name: "spread", title: "Spread", number: true, value: spread,
      show: (row) => fixed(spread(row), 1) },
  ];
  data.rows.forEach((row, place) => { row.place = place; });
  const words = (row) => `${row.query}\n${row.qid}\n${row.dataset}`;
  const open = (row, tr) => {
    const was = find("tr.detail"), same = was && was.previousSibling === tr;
    if (was) was.remove();
    if (same) return;
    const gained = data.names.map((name, i) => (row.values[i] === null || !i ? null
      : el("li", {}, `${name}: `, signed(row.values[i] - row.values[0], 1), " against the first stage")));
    tr.after(el("tr", { class: "detail" }, el("td", { colspan: columns.length },
      el("p", { class: "note" }, `query ${row.qid} of ${row.dataset}`), el("p", {}, row.query),
      el("ul", {}, gained))));
    tr.scrollIntoView({ block: "nearest" });
  };
  table(columns, data.rows, ["spread", true], words, open);
}

comparisonPage();
performance.mark("shown");
