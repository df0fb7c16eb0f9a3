'use strict';
(async () => {
  async function unpack(id) {
    const text = atob(document.getElementById(id).textContent), packed = new Uint8Array(text.length);
    for (let k = 0; k < text.length; k++) packed[k] = text.charCodeAt(k);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
    return new Response(stream).json();
  }
  const data = await unpack('data');
  const element = id => document.getElementById(id);
  const root = document.documentElement;
  const END = data.span / 1e9, FULL = [-0.02 * END, 1.02 * END], SHORTEST = 1e-7;
  const BARS = 1500, COLUMNS = 300, CELLS = 300;
  const STYLES = ['to-device', 'from-device', 'bidirectional', 'device', 'window', 'stale'];
  let [from, to] = FULL, query = '', paper = 0, isWaiting = false, hasDetails = false;
  const outdated = new Set();

  const escape = text => text.replace(/[&<>"]/g, each => `&#${each.charCodeAt(0)};`);
  const hex = number => '0x' + number.toString(16);
  const colour = name => getComputedStyle(root).getPropertyValue('--' + name).trim();
  const isPhone = () => window.innerWidth < 600;
  const number = value => value.toLocaleString('en-US');
  const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;
  function duration(ns) {
    if (ns >= 1e9) return `${+(ns / 1e9).toPrecision(4)} s`;
    return ns >= 1e6 ? `${+(ns / 1e6).toPrecision(4)} ms` : `${+(ns / 1e3).toPrecision(4)} µs`;
  }
  function bytes(count) {
    const unit = count ? Math.min(5, Math.floor(Math.log2(count) / 10)) : 0;
    return `${+(count / 1024 ** unit).toFixed(1)} ${['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'][unit]}`;
  }
  const moment = ns => `${(ns / 1e9).toFixed(6)} s`;

  // The finest level of detail that can be shown: `visible` returns what of a level is in view.
  function pick(levels, most, visible, width = 0) {
    let found = [levels[0], []];
    for (const level of levels) {
      found = [level, visible(level)];
      if (found[1].length <= most && level.width >= width) break;
    }
    return found;
  }
  function inView(level) {
    const low = from * 1e9, high = to * 1e9, found = [];
    for (let k = 0; k < level.start.length; k++)
      if (level.start[k] <= high && level.start[k] + level.length[k] >= low) found.push(k);
    return found;
  }
  function columnsInView(level) {
    const first = Math.max(0, Math.floor(from * 1e9 / level.width) - 1);
    const last = Math.min(level.count, Math.ceil(to * 1e9 / level.width) + 1);
    return Array.from({ length: Math.max(0, last - first) }, (_, k) => first + k);
  }

  // Search
  function matches(owner, low, high) {
    if (!query) return true;
    if (/^0x[0-9a-f]+$/i.test(query)) return low <= Number(query) && Number(query) < high;
    return owner.toLowerCase().includes(query.toLowerCase());
  }
  const found = (level, k) => matches(data.owners[level.owner[k]], level.low[k], level.high[k]);
  function tell() {
    const level = data.bars[0];
    const shown = Math.min(to, END) - Math.max(from, 0);
    let text = `Shown: ${duration(shown * 1e9)} of ${duration(data.span)}.`;
    if (query) {
      const hits = level.start.map((_, k) => k).filter(k => found(level, k));
      const owners = new Set(hits.map(k => level.owner[k]));
      const leases = hits.reduce((sum, k) => sum + level.total[k], 0);
      text += leases ? ` ${plural(leases, 'bar', 'bars')} of ${plural(owners.size, 'owner', 'owners')} ` +
        'match; the others are faded. Enter shows the time of the matches.' : ' Nothing matches.';
    }
    element('status').textContent = text;
    for (const row of document.querySelectorAll('tbody tr'))
      row.hidden = !matches(row.dataset.owner, Number(row.dataset.low), Number(row.dataset.high));
  }

  // Charts
  function layout(height, yaxis, more = {}) {
    const digits = Math.ceil(Math.log10(Math.max(Math.abs(from), to) / (to - from))) + 3;
    return {
      height, width: paper || undefined, showlegend: false, hovermode: 'closest', barmode: 'overlay',
      margin: { l: isPhone() ? 96 : 150, r: 12, t: 6, b: 30 }, paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: colour('plot'), hoverlabel: { align: 'left' },
      font: { color: colour('text'), size: 12, family: 'system-ui, "DejaVu Sans", sans-serif' },
      dragmode: matchMedia('(pointer: coarse)').matches ? false : 'zoom',
      xaxis: {
        range: [from, to], ticksuffix: 's', tickformat: to < 1000 ? `.${digits}~s` : ',', zeroline: false,
        gridcolor: colour('grid'), nticks: isPhone() ? 4 : 10, tickangle: 0,
      },
      yaxis: { fixedrange: true, zeroline: false, gridcolor: colour('grid'), ...yaxis }, ...more,
    };
  }
  function lines(top, bottom, marked) {
    const [level, shown] = pick(data.bursts, 200, inView, (to - from) * 1e9 / 160);
    const x = shown.map(k => level.start[k] / 1e9);
    const text = shown.map(k => `<b>${plural(level.total[k], 'INVALIDATE', 'INVALIDATEs')}</b> at ` +
      moment(level.start[k]) + (level.total[k] > 1 ? `, within ${duration(level.length[k])}` : '') +
      `<br>${plural(level.dropped[k], 'bucket', 'buckets')} dropped` +
      (level.held[k] ? `<br><b>${plural(level.held[k], 'DMA lease', 'DMA leases')} held across it</b>` : ''));
    const line = {
      type: 'scatter', mode: 'lines', hoverinfo: 'skip', line: { color: colour('invalidate'), width: 1.5, dash: 'dot' },
      x: x.flatMap(at => [at, at, null]), y: x.flatMap(() => [top, bottom, null]),
    };
    if (!marked) return [line];
    const many = shown.length > (isPhone() ? 6 : 20), room = (to - from) * 0.04;  // for a text
    return [line, {
      type: 'scatter', mode: many ? 'markers' : 'markers+text', x, y: x.map(() => top), hovertext: text,
      hoverinfo: 'text', textposition: 'middle right', cliponaxis: false,
      text: shown.map((k, n) => level.total[k] > 1 && !(x[n + 1] - x[n] < room) ? `×${number(level.total[k])}` : ''),
      marker: { symbol: 'triangle-down', size: 11, color: colour('invalidate') },
    }];
  }
  function describe(level, k) {
    const owner = `<b>${escape(data.owners[level.owner[k]])}</b>`, style = data.styles[level.style[k]];
    const start = level.start[k], length = level.length[k], stale = level.style[k] === 5;
    const warning = stale ? '<br><b>STALE: an INVALIDATE came while it was held</b>' : '';
    const times = `${moment(start)} to ${moment(start + length)}`;
    if (level.total[k] > 1)
      return `${owner}: ${number(level.total[k])} leases, ${style}<br>between ${hex(level.low[k])} and ` +
        `${hex(level.high[k] - 1)}<br>${times}${warning}<br><i>zoom in to see each</i>`;
    return `${owner}, ${style}<br>lease ${level.lease[k]}: ${hex(level.low[k])}, ` +
      `${bytes(level.high[k] - level.low[k])}<br>${times}: ${duration(length)}${warning}`;
  }
  function lanes(group) {
    const numbers = data.lanes.map((_, k) => k).filter(k => data.lanes[k].group === group);
    if (!numbers.length) return null;
    const place = new Map(numbers.map((lane, k) => [lane, k])), cut = isPhone() ? 12 : 20;
    const label = name => escape(name.length > cut ? name.slice(0, cut - 1) + '…' : name);
    const view = level => inView(level).filter(k => place.has(level.lane[k]));
    const [level, shown] = pick(data.bars, BARS, view);
    const least = (to - from) / 400;
    const traces = STYLES.map((style, number) => {
      const mine = shown.filter(k => level.style[k] === number);
      const rows = mine.map(k => data.lanes[level.lane[k]].rows);
      return {
        type: 'bar', orientation: 'h', hoverinfo: 'text', name: data.styles[number],
        base: mine.map(k => level.start[k] / 1e9),
        x: mine.map(k => Math.max(level.length[k] / 1e9, least)),
        y: mine.map((k, n) => place.get(level.lane[k]) - 0.4 + 0.8 * (level.row[k] + 0.5) / rows[n]),
        width: rows.map(count => 0.8 / count * (count > 1 ? 0.9 : 1)),
        hovertext: mine.map(k => describe(level, k)),
        marker: { color: colour(style), opacity: mine.map(k => found(level, k) ? 1 : 0.12), line: { width: 0 } },
      };
    });
    const axis = {
      range: [numbers.length - 0.4, -1.1], showgrid: false,
      tickvals: numbers.map((_, k) => k), ticktext: numbers.map(lane => label(data.lanes[lane].name)),
    };
    const shapes = numbers.filter((_, k) => k % 2).map(lane => ({
      type: 'rect', layer: 'below', xref: 'paper', x0: 0, x1: 1, line: { width: 0 },
      y0: place.get(lane) - 0.5, y1: place.get(lane) + 0.5, fillcolor: colour('grid'), opacity: 0.5,
    }));
    return [[...traces, ...lines(-0.8, numbers.length - 0.4, true)],
      layout(30 * numbers.length + 70, axis, { shapes })];
  }
  function heat() {
    const { rows, bytes: size, levels } = data.heat;
    if (!rows.length) return null;
    const [level, shown] = pick(levels, CELLS, columnsInView);
    const words = ['mapped, not used', '1 use', '2 or 3 uses', '4 to 15 uses', '16 to 63 uses', '64 uses or more'];
    const cell = (row, k) => level.cells[row][k] === '.' ? null : Number(level.cells[row][k]);
    const z = rows.map((_, row) => shown.map(k => cell(row, k)));
    const pixels = rows.length < 24 ? 15 : isPhone() ? 5 : 8, every = Math.ceil(14 / pixels);
    const scale = words.flatMap((_, k) => [[k / 6, colour('heat' + k)], [(k + 1) / 6, colour('heat' + k)]]);
    return [[{
      type: 'heatmap', z, zmin: -0.5, zmax: 5.5, colorscale: scale, showscale: false, hoverinfo: 'text',
      x: shown.map(k => (k + 0.5) * level.width / 1e9), hoverongaps: false, ygap: rows.length < 40 ? 1 : 0,
      text: z.map((line, row) => line.map((heat, k) => heat === null ? '' :
        `<b>${hex(rows[row])}</b> and the next ${bytes(size)}<br>from ${moment(shown[k] * level.width)} ` +
        `for ${duration(level.width)}<br>${words[heat]}`)),
    }, ...lines(-0.5, rows.length - 0.5, false)], layout(pixels * rows.length + 50, {
      range: [-0.5, rows.length - 0.5], showgrid: false,
      tickvals: rows.map((_, k) => k).filter(k => k % every === 0),
      ticktext: rows.map(hex).filter((_, k) => k % every === 0),
    })];
  }
  function series(parts, axis) {
    parts = parts.filter(part => data.series.levels[0][part.key].some(value => value));
    if (!parts.length) return null;
    const [level, shown] = pick(data.series.levels, COLUMNS, columnsInView);
    const top = Math.max(0, ...parts.flatMap(part => shown.map(k => part.value(level, k) || 0))) * 1.1 || 1;
    const traces = parts.map((part, n) => ({
      type: 'scatter', mode: 'lines', name: part.name, line: { shape: 'hv', color: colour('series' + n), width: 1.5 },
      x: shown.map(k => k * level.width / 1e9), y: shown.map(k => part.value(level, k)),
      hovertemplate: `${part.name}: %{y:.3~s}${axis.ticksuffix}<br>at %{x:.6~s}s<extra></extra>`,
    }));
    return [[...lines(0, top, false).map(line => ({ ...line, showlegend: false })), ...traces], layout(210,
      { range: [0, top], tickformat: '~s', ...axis },
      { showlegend: true, legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom' },
        margin: { l: isPhone() ? 96 : 150, r: 12, t: 30, b: 30 } })];
  }
  const rate = key => (level, k) => level[key][k] / level.width * 1e9;
  const seconds = key => (level, k) => level[key][k] ? level[key][k] / 1e9 : null;
  const charts = {
    dma: () => lanes('dma'),
    device: () => lanes('device'),
    addresses: heat,
    rates: () => series([
      { key: 'maps', name: 'map calls', value: rate('maps') },
      { key: 'requests', name: 'ioreqs', value: rate('requests') },
      { key: 'faults', name: 'missing pages', value: rate('faults') }], { ticksuffix: '/s' }),
    times: () => series([
      { key: 'handler_sum', name: 'handler, average',
        value: (level, k) => level.handled[k] ? level.handler_sum[k] / level.handled[k] / 1e9 : null },
      { key: 'handler_max', name: 'handler, longest', value: seconds('handler_max') },
      { key: 'quiesce_max', name: 'quiesce, longest', value: seconds('quiesce_max') }], { ticksuffix: 's' }),
  };
  function drawChart(name) {
    outdated.delete(name);
    const chart = element(name), made = charts[name]();
    if (!made) {
      chart.innerHTML = '<p class="empty">Nothing of this kind is in the recording.</p>';
      return;
    }
    const isNew = !chart.data;
    Plotly.react(chart, ...made, { displayModeBar: false, responsive: true, doubleClick: false });
    if (!isNew) return;
    chart.on('plotly_relayout', change => {
      if ('xaxis.range[0]' in change) show(change['xaxis.range[0]'], change['xaxis.range[1]']);
    });
    chart.on('plotly_doubleclick', () => show(...FULL));
  }
  // The first chart at once; then, one by one, those that are in sight; each other one when it is
  // scrolled there. So the page stays responsive, and opens in the time of what it shows.
  function draw() {
    tell();
    Object.keys(charts).forEach(name => outdated.add(name));
    drawChart('dma');
    performance.mark('first chart');
    drawLater();
  }
  function drawLater() {
    if (!isWaiting) setTimeout(drawNext);
    isWaiting = true;
  }
  function isInSight(name) {
    const box = element(name).getBoundingClientRect();
    return box.top < window.innerHeight + 100 && box.bottom > -100;
  }
  function drawNext() {
    isWaiting = false;
    const next = Object.keys(charts).find(name => outdated.has(name) && isInSight(name));
    if (next) {
      drawChart(next);
      drawLater();
      return;
    }
    performance.mark('charts in sight');
    if (!hasDetails) addDetails();
  }
  // The finer levels of detail; what is shown at first does not need them.
  async function addDetails() {
    hasDetails = true;
    const details = await unpack('details');
    data.bars.unshift(...details.bars);
    data.heat.levels.unshift(...details.heat);
    tell();
    if (to - from < FULL[1] - FULL[0]) draw();
    root.dataset.drawn = 'details';
  }
  function drawAll() {
    tell();
    Object.keys(charts).forEach(drawChart);
  }
  function show(start, end) {
    const span = Math.min(Math.max(end - start, SHORTEST), FULL[1] - FULL[0]);
    const middle = (start + end) / 2;
    from = Math.min(Math.max(middle - span / 2, FULL[0]), FULL[1] - span);
    to = from + span;
    draw();
  }
  const zoom = factor => show((from + to) / 2 - (to - from) * factor / 2, (from + to) / 2 + (to - from) * factor / 2);
  const pan = share => show(from + (to - from) * share, to + (to - from) * share);
  function paint(theme) {
    root.dataset.theme = theme;
    element('theme').textContent = theme === 'dark' ? 'Light' : 'Dark';
  }
  function swapTheme() {
    paint(root.dataset.theme === 'dark' ? 'light' : 'dark');
    draw();
  }
  function showMatches() {
    const level = data.bars[0], hits = level.start.map((_, k) => k).filter(k => found(level, k));
    if (!query || !hits.length) return;
    const start = hits.reduce((least, k) => Math.min(least, level.start[k]), Infinity) / 1e9;
    const end = hits.reduce((most, k) => Math.max(most, level.start[k] + level.length[k]), 0) / 1e9;
    const room = Math.max(end - start, END / 1e4) * 0.1;
    show(start - room, end + room);
  }

  const keys = {
    '+': () => zoom(0.5), '=': () => zoom(0.5), '-': () => zoom(2), '0': () => show(...FULL),
    ArrowLeft: () => pan(-0.25), ArrowRight: () => pan(0.25), t: swapTheme, '/': () => element('search').focus(),
  };
  document.addEventListener('keydown', event => {
    const action = keys[event.key];
    if (!action || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === 'INPUT') return;
    event.preventDefault();
    action();
  });
  const buttons = { closer: '+', wider: '-', left: 'ArrowLeft', right: 'ArrowRight', all: '0', theme: 't' };
  for (const [id, key] of Object.entries(buttons)) element(id).addEventListener('click', keys[key]);
  element('search').addEventListener('input', event => { query = event.target.value.trim(); draw(); });
  element('search').addEventListener('keydown', event => {
    if (event.key === 'Enter') showMatches();
    if (event.key === 'Escape') { event.target.value = query = ''; event.target.blur(); draw(); }
  });
  for (const button of document.querySelectorAll('td.show button'))
    button.addEventListener('click', () => {
      const start = Number(button.dataset.start) / 1e9, length = Number(button.dataset.held) / 1e9;
      const room = Math.max(length * 0.3, END / 1e4);
      show(start - room, start + length + room);
      element(button.dataset.chart).scrollIntoView({ block: 'center' });
    });
  for (const event of ['scroll', 'resize']) window.addEventListener(event, drawLater, { passive: true });
  let usual = 'light';
  window.addEventListener('beforeprint', () => { usual = root.dataset.theme; paper = 700; paint('light'); drawAll(); });
  window.addEventListener('afterprint', () => { paper = 0; paint(usual); drawAll(); });
  const dark = matchMedia('(prefers-color-scheme: dark)');
  dark.addEventListener('change', () => { paint(dark.matches ? 'dark' : 'light'); draw(); });
  paint(dark.matches ? 'dark' : 'light');
  draw();
})();
