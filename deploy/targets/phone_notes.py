"""What a phone's bundle says of itself: versions that the samples are pinned to, and what was not built or run."""

from __future__ import annotations

VERSIONS = {
    "genai": "0.18.0",
    "onnxruntime": "1.31.0",
    "android_gradle_plugin": "8.9.1",
    "gradle": "8.11.1",
    "kotlin": "2.1.20",
    "expo": "57.0.26",
    "expo_asset": "57.0.18",
    "expo_file_system": "57.0.7",
    "llama_rn": "0.12.9",
    "react": "19.2.3",
    "react_native": "0.86.3",
    "types_react": "19.2.18",
    "typescript": "6.0.3",
}

NEEDS = {
    "gguf": (
        f"llama.cpp of 2025 or newer, or a binding of it (the sample: llama.rn {VERSIONS['llama_rn']})",
        "a 64-bit ARM processor; from ARMv8.2 (dot products) on llama.cpp runs at full speed",
    ),
    "onnx": (
        f"onnxruntime-genai {VERSIONS['genai']} with onnxruntime {VERSIONS['onnxruntime']}",
        "for the Android sample: Android 8 or newer on arm64-v8a or x86_64",
    ),
}

# Each with the check that stood in for it; all of them are in tests/deploy/test_phone*.py.
UNPROVEN = {
    "gguf": (
        "react-native/ was not built and ran on no phone. Instead, in the tests of the program that made this bundle: "
        f"its TypeScript compiles in strict mode against the types of llama.rn {VERSIONS['llama_rn']}, React Native "
        f"{VERSIONS['react_native']} and Expo {VERSIONS['expo']}, its JSON parses, bring-model.mjs runs under Node.js, "
        "and llama.cpp opens the file and answers on a desktop processor.",
        "termux/run.sh was not run in Termux. Instead: shellcheck finds nothing, and up to the start of llama.cpp it "
        "runs under Debian's sh.",
        "No speed was measured on a phone. What is repacked for ARM was read from the file by the rules of llama.cpp.",
    ),
    "onnx": (
        "android/ was not built and ran on no phone. Instead, in the tests of the program that made this bundle: its "
        "Gradle and Kotlin files parse without an error, its XML parses, Expert.kt and ModelFiles.kt compile with "
        f"Kotlin {VERSIONS['kotlin']}, the model is copied and checked by them on a desktop's Java, and the calls that "
        f"the app makes give an answer from Python, with onnxruntime-genai {VERSIONS['genai']} on a desktop processor.",
        f"onnxruntime-genai-android-{VERSIONS['genai']}.aar and the Maven artifact onnxruntime-android "
        f"{VERSIONS['onnxruntime']} were not at hand: their Java classes were taken as the projects' published sources "
        "declare them.",
    ),
}
