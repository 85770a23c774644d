// Ages instead of dates, what changes live, colours by choice, and images dropped in. Without it the
// pages show the same and every form works.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  const policy = window.trustedTypes
    ? trustedTypes.createPolicy("pollard", { createHTML: (html) => html })
    : { createHTML: (html) => html };

  // Parts come from the server, where everything is escaped; they are parsed apart from the page.
  const parse = (html) =>
    new DOMParser().parseFromString(policy.createHTML(`<body>${html}</body>`), "text/html").body;

  // Ages

  const spans = [["d", 86400], ["h", 3600], ["min", 60]];
  const age = (seconds) => {
    if (seconds < 5) return "just now";
    for (const [unit, length] of spans) {
      if (seconds >= length) return `${Math.floor(seconds / length)} ${unit} ago`;
    }
    return `${Math.floor(seconds)} s ago`;
  };
  const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const showAges = (within = document) => {
    for (const element of within.querySelectorAll("time")) {
      const at = new Date(element.dateTime);
      const seconds = (Date.now() - at) / 1000;
      const words = seconds < 30 * 86400 ? age(seconds) : at.toLocaleDateString(undefined, { dateStyle: "medium" });
      if (element.textContent !== words) element.textContent = words;
      const title = local.format(at);
      if (element.title !== title) element.title = title;
    }
  };
  showAges();
  setInterval(showAges, 5000);

  // Live parts: what differs is changed in place, so that focus and what is open stay as they are.

  const keyOf = (node) => (node.nodeType === 1 && (node.dataset.key || node.id)) || "";
  const sameKind = (a, b) =>
    a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);

  const morph = (from, to) => {
    if (from.nodeType !== 1) {
      if (from.data !== to.data) from.data = to.data;
      return;
    }
    for (const { name } of [...from.attributes]) {
      const kept = (from.nodeName === "DETAILS" && name === "open") || (from.nodeName === "TIME" && name === "title");
      if (!to.hasAttribute(name) && !kept) from.removeAttribute(name);
    }
    for (const { name, value } of to.attributes) {
      if (from.getAttribute(name) !== value) from.setAttribute(name, value);
    }
    if (from.nodeName === "TIME") return;
    morphChildren(from, to);
  };
  const morphChildren = (from, to) => {
    let here = from.firstChild;
    for (const wanted of [...to.childNodes]) {
      let found = here;
      if (!found || !sameKind(found, wanted)) {
        found = null;
        for (let next = here; next; next = next.nextSibling) {
          if (keyOf(wanted) && sameKind(next, wanted)) { found = next; break; }
        }
      }
      if (!found) {
        from.insertBefore(document.importNode(wanted, true), here);
        continue;
      }
      if (found !== here) from.insertBefore(found, here);
      else here = here.nextSibling;
      morph(found, wanted);
    }
    while (here) {
      const next = here.nextSibling;
      here.remove();
      here = next;
    }
  };

  const state = document.getElementById("link-state");
  const say = (words, broken = false) => {
    if (state.textContent !== words) state.textContent = words;
    state.classList.toggle("broken", broken);
  };
  let source = null;
  const follow = () => {
    const path = document.body.dataset.live;
    if (source || !path) return;
    source = new EventSource(path);
    source.addEventListener("version", (event) => {
      // The service was updated: this page's script may not fit its parts any more.
      if (JSON.parse(event.data) !== document.body.dataset.version) location.reload();
      else say("Live");
    });
    source.addEventListener("part", (event) => {
      const { id, html } = JSON.parse(event.data);
      const place = document.getElementById(id);
      if (!place) return;
      const parsed = parse(html);
      morphChildren(place, parsed);
      showAges(place);
      document.dispatchEvent(new CustomEvent("pollard:part", { detail: id }));
    });
    source.addEventListener("gone", (event) => {
      leave();
      say("Ended", true);
      state.title = JSON.parse(event.data);
    });
    source.onerror = () => {
      if (source && source.readyState === EventSource.CLOSED) { leave(); say("Not live", true); }
      else say("Reconnecting", true);
    };
  };
  const leave = () => {
    if (source) source.close();
    source = null;
  };
  // A page that nobody sees holds no connection: a browser has only a few for each server.
  document.addEventListener("visibilitychange", () => (document.hidden ? leave() : follow()));
  addEventListener("pagehide", leave);
  addEventListener("pageshow", follow);
  follow();
  // A form that was refused is answered at its own address, which nobody should load again.
  if (document.body.dataset.live && document.body.dataset.live !== location.pathname + location.search) {
    history.replaceState(null, "", document.body.dataset.live);
  }

  // Colours

  const themes = { "": "as the system has them", light: "light", dark: "dark" };
  const button = document.getElementById("theme");
  const label = () => {
    const words = `Colours: ${themes[root.dataset.theme || ""]}`;
    button.title = words;
    button.setAttribute("aria-label", words);
  };
  label();
  button.addEventListener("click", () => {
    const order = Object.keys(themes);
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    document.cookie = `pollard-theme=${next}; path=/; max-age=31536000; SameSite=Strict`;
    label();
  });

  // Images that are dropped, pasted or chosen

  const trial = document.getElementById("trial");
  if (trial) {
    const input = document.getElementById("image");
    const drop = document.getElementById("drop");
    const chosen = document.getElementById("chosen");
    const outcome = document.getElementById("outcome");
    const asks = document.getElementById("ask");
    let shown = "";
    let asked = null;
    const tell = (words) => {
      const notice = document.createElement("p");
      notice.className = "notice bad";
      notice.setAttribute("role", "alert");
      notice.textContent = words;
      outcome.replaceChildren(notice);
    };
    const ask = async () => {
      const file = input.files[0];
      if (!file) return;
      if (asked) asked.abort();
      const mine = (asked = new AbortController());
      chosen.textContent = file.name;
      asks.disabled = true;
      outcome.setAttribute("aria-busy", "true");
      try {
        const answer = await fetch(trial.action, {
          method: "POST", body: new FormData(trial), headers: { "X-Pollard-Part": "1" }, signal: mine.signal,
        });
        const parsed = parse(await answer.text());
        if (!answer.ok) {
          const said = parsed.querySelector(".problem p:not(.problem-code)");
          tell(said ? said.textContent : `The service answered ${answer.status}.`);
          return;
        }
        if (shown) URL.revokeObjectURL(shown);
        shown = URL.createObjectURL(file);
        for (const image of parsed.querySelectorAll("img[data-source]")) image.src = shown;
        outcome.replaceChildren(...parsed.childNodes);
        for (const image of outcome.querySelectorAll("img[data-source]")) {
          image.addEventListener("error", () => { image.alt = "This browser cannot show the image."; image.classList.add("unseen"); });
        }
      } catch (error) {
        if (error.name !== "AbortError") tell("The service did not answer. Try again.");
      } finally {
        if (asked === mine) {
          asks.disabled = false;
          outcome.removeAttribute("aria-busy");
        }
      }
    };
    const take = (files) => {
      const images = [...files].filter((file) => file.type.startsWith("image/"));
      if (!images.length) return;
      const transfer = new DataTransfer();
      transfer.items.add(images[0]);
      input.files = transfer.files;
      ask();
    };
    trial.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    for (const each of [input, ...trial.querySelectorAll("select")]) each.addEventListener("change", ask);
    addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
    addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      take(event.dataTransfer.files);
    });
    addEventListener("paste", (event) => take(event.clipboardData.files));
  }

  // What a press has set going is not set going twice.
  document.addEventListener("submit", (event) => {
    if (event.target.method !== "post" || event.defaultPrevented) return;
    for (const each of event.target.querySelectorAll("button")) setTimeout(() => { each.disabled = true; });
  });
  addEventListener("pageshow", () => {
    for (const each of document.querySelectorAll("form button:disabled")) each.disabled = false;
  });
})();
