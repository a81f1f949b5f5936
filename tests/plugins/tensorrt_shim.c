/* Test-only stand-in for the three TensorRT libraries that its Python bindings are linked to, where
 * TensorRT itself is not installed. There is no builder, refitter or parser: those are null. The
 * plugin registry is the lean runtime's, which is real; getPluginRegistry itself resolves to it. */
#include <stddef.h>

extern void* getPluginRegistry(void); /* libnvinfer_lean.so, loaded with RTLD_GLOBAL */

void* getBuilderPluginRegistry(int capability) { (void)capability; return getPluginRegistry(); }
void* createInferBuilder_INTERNAL(void* logger, int version) { (void)logger; (void)version; return NULL; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version)
{ (void)network; (void)logger; (void)version; return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version)
{ (void)refitter; (void)logger; (void)version; return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, char const* space) { (void)logger; (void)space; return 1; }
