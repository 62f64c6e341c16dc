// Runs the search in pages that are opened as files. Browsers start no Worker from a file, so that its script runs in a
// hidden frame instead. Material would load such a script from another server.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title>";
      frame.addEventListener("load", () => this.load(frame.contentWindow, new URL(script, location.href)), { once: true });
      document.documentElement.append(frame);
    }

    load(inner, script) {
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const element = inner.document.createElement("script");
      element.src = script;
      element.addEventListener("load", () => {
        this.inner = inner;
        for (const data of this.waiting.splice(0)) this.postMessage(data);
      });
      inner.document.body.append(element);
    }

    postMessage(data) {
      if (this.inner) this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
}
