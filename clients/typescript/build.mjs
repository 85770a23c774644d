// Compile for `import`, with types, and for `require`: node build.mjs
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import ts from "typescript";

const here = path.dirname(fileURLToPath(import.meta.url));
const dist = path.join(here, "dist");
const host = { ...ts.sys, onUnRecoverableConfigFileDiagnostic: report };
const config = ts.getParsedCommandLineOfConfigFile(path.join(here, "tsconfig.json"), {}, host);

function report(...diagnostics) {
  console.error(ts.formatDiagnosticsWithColorAndContext(diagnostics, {
    getCanonicalFileName: (name) => name,
    getCurrentDirectory: () => here,
    getNewLine: () => "\n",
  }));
  process.exit(1);
}

// Which of the two a .js file is, Node takes from the package.json nearest to it.
function mark(folder, type) {
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, "package.json"), JSON.stringify({ type }) + "\n");
}

rmSync(dist, { recursive: true, force: true });
mark(path.join(dist, "esm"), "module");
const program = ts.createProgram(config.fileNames, config.options);
const { diagnostics } = program.emit();
const found = [...ts.getPreEmitDiagnostics(program), ...diagnostics];
if (found.length > 0) report(...found);

// The types are the same, so only the code is written once more; the check need not be repeated.
cpSync(path.join(dist, "esm"), path.join(dist, "cjs"), {
  recursive: true,
  filter: (name) => !name.endsWith(".js"),
});
mark(path.join(dist, "cjs"), "commonjs");
for (const name of config.fileNames) {
  const { outputText } = ts.transpileModule(readFileSync(name, "utf8"), {
    compilerOptions: {
      ...config.options,
      module: ts.ModuleKind.CommonJS,
      moduleResolution: ts.ModuleResolutionKind.Node10,
      // The rest of what concerns a whole program.
      declaration: false,
    },
  });
  const relative = path.relative(config.options.rootDir, name).replace(/\.ts$/, ".js");
  const out = path.join(dist, "cjs", relative);
  mkdirSync(path.dirname(out), { recursive: true });
  writeFileSync(out, outputText);
}
