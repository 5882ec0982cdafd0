// Opens reports in headless Chromium: pictures of each, its accessibility by axe-core, what it asks the network for, how
// long it takes to open. Called by report_check.py.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { join } from "node:path";

const [modules, chromium, output, ...files] = process.argv.slice(2);
const require = createRequire(join(modules, "node_modules", "_"));
const { chromium: browserType } = require("playwright-core");
const axe = require.resolve("axe-core");

const browser = await browserType.launch({ executablePath: chromium, args: ["--no-sandbox"] });
const found = [];
for (const file of files) {
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [1280, 390]) {
      const context = await browser.newContext({ colorScheme, viewport: { width, height: 844 } });
      const page = await context.newPage();
      const asked = [], errors = [];
      page.on("request", (request) => asked.push(request.url()));
      page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
      page.on("pageerror", (error) => errors.push(String(error)));
      const address = pathToFileURL(file).href;
      const began = performance.now();
      await page.goto(address, { waitUntil: "load" });
      await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
      const seconds = (performance.now() - began) / 1000;
      const scrolls = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      const name = `${file.split("/").at(-2)}-${colorScheme}-${width}`;
      if (output) await page.screenshot({ path: join(output, `${name}.png`), fullPage: true });
      await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
      await page.addScriptTag({ path: axe });
      const result = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
      found.push({
        file, colorScheme, width, seconds, scrolls, errors,
        network: asked.filter((url) => url !== address && !url.startsWith("data:")),
        violations: result.violations.map((each) => ({
          id: each.id, impact: each.impact, help: each.help, nodes: each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)),
          why: each.nodes.slice(0, 2).map((node) => node.failureSummary),
        })),
      });
      await context.close();
    }
  }
}
await browser.close();
console.log(JSON.stringify(found, null, 1));
