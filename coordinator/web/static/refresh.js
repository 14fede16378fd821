// Keeps <main> up to date: asks for the page again and changes only what differs, so that focus,
// selection and scroll stay where they are. Without this script the pages are complete, but still.
"use strict";
(() => {
  const EVERY_MS = 3000, SLOWEST_MS = 60000;
  const main = document.getElementById("main");
  const live = document.getElementById("live");
  const stale = document.getElementById("stale");
  const said = document.getElementById("said");
  let tag = null, wait = EVERY_MS, timer = 0, asking = null;

  function attributes(old, fresh) {
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
  }

  function morph(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    attributes(old, fresh);
    const before = [...old.childNodes], after = [...fresh.childNodes];
    after.forEach((node, at) => (at < before.length ? morph(before[at], node) : old.append(node)));
    before.slice(after.length).forEach((node) => node.remove());
  }

  function show(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const fresh = page.getElementById("main");
    if (!fresh) return;
    const phase = (root) => root.querySelector(".badge")?.textContent ?? "";
    const alerts = (root) => root.querySelectorAll(".notices li").length;
    const tell = phase(main) !== phase(fresh) || alerts(fresh) > alerts(main);
    document.title = page.title;
    morph(main, fresh);
    // Only what matters is spoken: a phase that ended, or a new alert; not every step.
    if (tell) said.textContent = document.getElementById("sentence")?.textContent ?? "";
  }

  async function refresh() {
    clearTimeout(timer);
    if (document.hidden || !live.checked) return;
    asking?.abort();
    asking = new AbortController();
    const limit = setTimeout(() => asking.abort(), 15000);
    try {
      const answer = await fetch(location.href, {
        headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store", signal: asking.signal,
      });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        show(await answer.text());
      } else if (answer.status !== 304) {
        throw new Error(String(answer.status));
      }
      wait = EVERY_MS;
      stale.textContent = "";
    } catch {
      wait = Math.min(SLOWEST_MS, 2 * wait);
      stale.textContent = "The coordinator does not answer; this page is no longer up to date.";
    } finally {
      clearTimeout(limit);
    }
    timer = setTimeout(refresh, wait);
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  live.addEventListener("change", refresh);
  timer = setTimeout(refresh, EVERY_MS);
})();
